# Everything starts here: `make help`.
#
# The targets install what they need, system packages by apt (with sudo when not root) and Python packages into a
# virtual environment, and only what is missing. PYTHON=python3.12 chooses another Python; it gets its own environment.

PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard unionfs/csrc/*.[ch])

# What `make mount` is given; with none of them it mounts a demonstration.
LOWER ?=
UPPER ?=
MERGED ?=
WORK ?=
OPTIONS ?=
export LOWER UPPER MERGED WORK OPTIONS PYTHON VENV

# Further arguments for pytest, such as ARGS='-k rename', or for the comparison.
ARGS ?=
# How many tests run at the same time; 0: one after the other, in make's own process.
JOBS ?= 2
# How many operation sequences `make fuzz` runs against kernel overlayfs at most.
SEQUENCES ?= 2000
# How long `make verify`, `make powercut`, `make crash`, `make fuzz` and `make soak` run.
MINUTES ?= 10
crash: MINUTES = 5
soak: MINUTES = 20

# What `make vm-test` boots: the kernel of this Debian suite. What `make vagrant-test` starts: one machine, or all.
KERNEL ?=
BOX ?=
export KERNEL

.PHONY: help mount umount test lint types fuzz verify crash powercut soak compare sanitize clean root packages \
	packages-test packages-soak integration vm-test bare-test vagrant-test vagrant-box

help:
	@echo 'make mount                             a demonstration union under ./demo'
	@echo 'make mount LOWER=a:b UPPER=u MERGED=m  a union of yours; also WORK=, OPTIONS=; without UPPER read-only'
	@echo 'make umount [MERGED=m]                 unmount it'
	@echo 'make test [ARGS=...] [JOBS=2]          all tests, two at a time (as root)'
	@echo 'make lint types                        ruff, mypy'
	@echo 'make fuzz [MINUTES=10]                 every parser and the command line with damaged input, races with swapped'
	@echo '                                       directories, random operations compared with kernel overlayfs (as root)'
	@echo 'make verify [MINUTES=10]               fio with checksums on all that it reads, in every mode (as root)'
	@echo 'make crash [MINUTES=5] [ARGS=...]      the daemon killed before each system call that changes something (as root)'
	@echo 'make powercut [MINUTES=10] [ARGS=...]  the power cut at any moment, on a disk that remembers what was written (as root)'
	@echo 'make soak [MINUTES=20] [ARGS=...]      stress-ng, dbench, fio and clients of our own at once (as root)'
	@echo 'make compare [ARGS=...]                how fast this is beside overlayfs and others; ARGS=--help explains'
	@echo 'make integration [ARGS=...]            check this host from its wheel on, beside its own overlayfs (as root)'
	@echo 'make vm-test [KERNEL=trixie]           the same in a virtual machine with Linux 6.1, or another kernel (as root)'
	@echo 'make bare-test [SUITE=trixie]          installation in a new root that debootstrap makes: Debian 12, or SUITE (as root)'
	@echo 'make vagrant-test [BOX=debian12]       the same in Vagrant machines: Debian, Ubuntu, Fedora'
	@echo 'make vagrant-box [KERNEL=trixie]       a box for that, made of the root and the kernel of make vm-test (as root)'
	@echo 'make sanitize [ARGS=...]               tests of the native part under ASan and UBSan (as root)'
	@echo 'make clean                             remove what these made'

mount: packages $(VENV)/.installed
	@scripts/mount

umount:
	@scripts/umount

test: root packages-test $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: packages $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: packages $(VENV)/.installed-test
	$(BIN)/mypy

fuzz: root packages-test $(VENV)/.installed-test
	$(BIN)/python -m tests.fuzz --minutes $$(( ($(MINUTES) + 2) / 3 ))
	UNIONFS_RACE_SECONDS=$$(( $(MINUTES) * 60 / 3 / 8 )) $(BIN)/python -m pytest tests/mount/test_races_outside.py --timeout 0 -rP $(ARGS)
	UNIONFS_FUZZ_SEQUENCES=$(SEQUENCES) UNIONFS_FUZZ_SECONDS=$$(( $(MINUTES) * 60 / 3 / 2 )) \
		$(BIN)/python -m pytest tests/differential --timeout 0 -rP $(ARGS)

verify: root packages-test $(VENV)/.installed-test
	@$(BIN)/python -m tests.verify --minutes $(MINUTES) $(ARGS)

crash: root packages-test $(VENV)/.installed-test
	@$(BIN)/python -m tests.crash --minutes $(MINUTES) $(ARGS)

powercut: root packages-test $(VENV)/.installed-test
	@$(BIN)/python -m tests.power --minutes $(MINUTES) $(ARGS)

soak: root packages-test packages-soak $(VENV)/.installed-test
	@$(BIN)/python -m tests.soak --minutes $(MINUTES) $(ARGS)

compare: packages $(VENV)/.installed
	@scripts/compare $(ARGS)

integration: root
	@scripts/integration.sh $(ARGS)

vm-test: root
	@scripts/packages vm
	@scripts/vm-test $(ARGS)

bare-test: root
	@scripts/packages vm
	@scripts/vm-test --bare

vagrant-box: root
	@scripts/packages vm
	@scripts/vm-test --box

vagrant-test:
	@scripts/vagrant-test $(BOX)

sanitize: root packages-test $(VENV)/.installed-test
	@scripts/sanitize $(BIN)/python $(ARGS)

clean:
	@scripts/umount --quiet
	rm -rf .venv .venv-* build demo *.egg-info unionfs/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

root:
	@[ "$$(id -u)" = 0 ] || { echo 'the tests mount file systems of all kinds: run this as root' >&2; exit 1; }

packages:
	@scripts/packages mount

packages-test:
	@scripts/packages test

packages-soak:
	@scripts/packages soak

$(VENV)/.installed: $(SOURCES) | packages
	@scripts/environment .

$(VENV)/.installed-test: $(SOURCES) | packages
	@scripts/environment '.[test]'
