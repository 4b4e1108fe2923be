"""A program that imports much, from the library in its first argument: what a Python program does when it starts.

It imports nothing itself, so that all comes from there (run it with -I -S). Some of the modules are gone in newer Pythons,
or need C code that a machine's Python may lack; that is the same for all who run it there.
"""

import sys

MODULES = """
argparse ast asyncio base64 bz2 calendar cgi cmd code codecs collections.abc compileall concurrent.futures.process
concurrent.futures.thread configparser contextlib copy csv ctypes.util curses dataclasses datetime dbm decimal difflib dis
doctest email.generator email.mime.multipart email.mime.text email.parser email.policy ensurepip enum filecmp fileinput
fractions ftplib getpass gettext glob graphlib gzip heapq hmac html.parser http.client http.cookiejar http.server imaplib
importlib.metadata importlib.resources inspect ipaddress json.tool logging.config logging.handlers lzma
mailbox mimetypes modulefinder multiprocessing.managers multiprocessing.pool multiprocessing.shared_memory netrc nntplib
numbers optparse pathlib pdb pickletools pkgutil platform plistlib poplib pprint profile pstats pyclbr pydoc queue quopri
random runpy sched secrets selectors shelve shlex shutil smtplib socketserver sqlite3 ssl statistics subprocess symtable
tabnanny tarfile telnetlib tempfile textwrap threading timeit tokenize tomllib trace traceback tracemalloc typing unittest.mock
unittest.async_case urllib.request urllib.robotparser uuid venv wave weakref webbrowser wsgiref.simple_server
xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils xmlrpc.client xmlrpc.server zipapp zipfile zoneinfo
""".split()  # noqa: SIM905  # nobody wants to read that as a list

sys.path.insert(0, sys.argv[1])
for name in MODULES:
    try:
        __import__(name)
    except ImportError:
        pass
print(len(sys.modules))
