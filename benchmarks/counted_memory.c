/* Counts the bytes that torch's CPU allocator holds, in all threads, and their peak.

   torch takes tensors and the scratch memory of its kernels from posix_memalign, and returns them by
   free. Preload this library to count both: see counted_memory.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

enum { PLACES = 1 << 20, SMALLEST = 4096 };

static void *pointers[PLACES]; /* open addressing; GONE keeps the way to later places */
static size_t sizes[PLACES];
static char gone;
#define GONE ((void *)&gone)
static size_t now, most;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t first_place(void *pointer) {
  return (((uintptr_t)pointer >> 6) * 0x9E3779B97F4A7C15ull) >> 44;
}

int posix_memalign(void **out, size_t alignment, size_t size) {
  *out = memalign(alignment, size);
  if (*out == NULL) return 12; /* ENOMEM */
  if (size < SMALLEST) return 0;
  pthread_mutex_lock(&lock);
  size_t place = first_place(*out);
  while (pointers[place] != NULL && pointers[place] != GONE) place = (place + 1) % PLACES;
  pointers[place] = *out;
  sizes[place] = size;
  now += size;
  if (now > most) most = now;
  pthread_mutex_unlock(&lock);
  return 0;
}

void free(void *pointer) {
  static void (*next)(void *);
  if (next == NULL) next = (void (*)(void *))dlsym(RTLD_NEXT, "free");
  if (pointer != NULL && ((uintptr_t)pointer & 63) == 0) {
    pthread_mutex_lock(&lock);
    size_t place = first_place(pointer);
    while (pointers[place] != NULL && pointers[place] != pointer) place = (place + 1) % PLACES;
    if (pointers[place] == pointer) {
      now -= sizes[place];
      pointers[place] = GONE;
    }
    pthread_mutex_unlock(&lock);
  }
  next(pointer);
}

int counted_at(void *pointer) {
  pthread_mutex_lock(&lock);
  size_t place = first_place(pointer);
  while (pointers[place] != NULL && pointers[place] != pointer) place = (place + 1) % PLACES;
  int found = pointers[place] == pointer;
  pthread_mutex_unlock(&lock);
  return found;
}

size_t counted_now(void) { return now; }
size_t counted_most(void) { return most; }
void counted_restart(void) {
  pthread_mutex_lock(&lock);
  most = now;
  pthread_mutex_unlock(&lock);
}
