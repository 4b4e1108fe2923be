/*
 * What may take long is done by a few threads that know nothing of Python.
 */
#include "native.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

enum { MOST_WORKERS = 8 };

static pthread_mutex_t jobs_lock = PTHREAD_MUTEX_INITIALIZER; /* guards the rest */
static pthread_cond_t job_added = PTHREAD_COND_INITIALIZER;
static pthread_cond_t jobs_done = PTHREAD_COND_INITIALIZER;
static struct job *first_job, **last_job = &first_job;
static int workers, idle_workers;
static int unfinished; /* jobs waiting or running */

static struct job *next_job_locked(void)
{
	struct job *job;

	while (!first_job) {
		idle_workers++;
		pthread_cond_wait(&job_added, &jobs_lock);
		idle_workers--;
	}
	job = first_job;
	first_job = job->next;
	if (!first_job)
		last_job = &first_job;
	return job;
}

static void *work(void *unused UNUSED)
{
	pthread_mutex_lock(&jobs_lock);
	for (;;) {
		struct job *job = next_job_locked();

		pthread_mutex_unlock(&jobs_lock);
		job->run(job);
		free(job);
		pthread_mutex_lock(&jobs_lock);
		if (--unfinished == 0)
			pthread_cond_broadcast(&jobs_done);
	}
	return NULL;
}

/* Signals are Python's: the workers block all of them. */
static void add_worker_locked(void)
{
	sigset_t all, before;
	pthread_t thread;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	if (!pthread_create(&thread, NULL, work, NULL)) {
		pthread_detach(thread);
		workers++;
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Have a copy of the job done; here and now if there can't be a thread. */
void submit(const struct job *job)
{
	struct job *copy = malloc(sizeof(*copy));
	bool queued = false;

	pthread_mutex_lock(&jobs_lock);
	if (copy && !idle_workers && workers < MOST_WORKERS)
		add_worker_locked();
	if (copy && workers) {
		*copy = *job;
		copy->next = NULL;
		*last_job = copy;
		last_job = &copy->next;
		unfinished++;
		pthread_cond_signal(&job_added);
		queued = true;
	}
	pthread_mutex_unlock(&jobs_lock);
	if (!queued) {
		free(copy);
		job->run(job);
	}
}

/* A job answers through the session: it must not go away before. */
void wait_for_jobs(void)
{
	Py_BEGIN_ALLOW_THREADS
	pthread_mutex_lock(&jobs_lock);
	while (unfinished)
		pthread_cond_wait(&jobs_done, &jobs_lock);
	pthread_mutex_unlock(&jobs_lock);
	Py_END_ALLOW_THREADS
}
