/* Loaded before the C library (LD_PRELOAD): once the file CLOCK_JUMP_FILE is there, the clock of the day is another by
 * CLOCK_JUMP_SECS. What measures the time that passes is not. Built and used by clock.rs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int (*real_gettime)(clockid_t, struct timespec *);
static time_t jump;
static const char *file;

__attribute__((constructor)) static void begin(void) {
    real_gettime = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    jump = atol(getenv("CLOCK_JUMP_SECS"));
    file = getenv("CLOCK_JUMP_FILE");
}

static time_t shift(void) {
    static int told;
    if (access(file, F_OK) != 0) return 0;
    if (!__sync_lock_test_and_set(&told, 1)) {
        static const char text[] = "the clock jumps\n";
        if (write(2, text, sizeof text - 1) < 0) return jump;
    }
    return jump;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    if (!real_gettime) begin();
    int result = real_gettime(clock, time);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) time->tv_sec += shift();
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
