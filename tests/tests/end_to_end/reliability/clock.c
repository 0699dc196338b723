/* Loaded before the C library (LD_PRELOAD): some seconds after the process has started, its clock of the day jumps by
 * CLOCK_JUMP_SECS. What measures the time that passes does not. Built and used by clock.rs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int (*real_gettime)(clockid_t, struct timespec *);
static time_t jump, jump_at;

__attribute__((constructor)) static void begin(void) {
    struct timespec now;
    real_gettime = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    real_gettime(CLOCK_MONOTONIC, &now);
    jump = atol(getenv("CLOCK_JUMP_SECS"));
    jump_at = now.tv_sec + atol(getenv("CLOCK_JUMP_AFTER_SECS"));
}

static time_t shift(void) {
    static int told;
    struct timespec now;
    real_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec < jump_at) return 0;
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
