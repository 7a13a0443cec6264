"""Optional tools of the machine for `torture.py`: a preloaded clock, strace, mounts, file modes."""

import os
import shutil
import subprocess
import sys
import time

CLOCK = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offset;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("TORTURE_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *at = mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    if (at != MAP_FAILED) offset = at;
    close(file);
}
int clock_gettime(clockid_t id, struct timespec *now) {
    int code = syscall(SYS_clock_gettime, id, now);
    if (!code && offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *offset;
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    int code = syscall(SYS_gettimeofday, now, zone);
    if (!code && offset) now->tv_sec += *offset;
    return code;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
int sem_timedwait(sem_t *sem, const struct timespec *until) {
    int (*real)(sem_t *, const struct timespec *) = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec at = *until;
    if (offset) at.tv_sec -= *offset;
    return real(sem, &at);
}
"""


class Tools:
    """The tools that this machine has; faults that need a missing one are counted as skipped."""

    def __init__(self, folder):
        self.clock = self._build_clock(folder)
        self.strace = shutil.which("strace") if self._can_strace() else None
        self.mounts = self._can_mount(folder)
        self.unprivileged = self._unprivileged_prefix()

    @staticmethod
    def _build_clock(folder):
        compiler, library = shutil.which("cc") or shutil.which("gcc"), folder / "clock.so"
        if compiler is None:
            return None
        (folder / "clock.c").write_text(CLOCK)
        line = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / "clock.c"), "-ldl"]
        if subprocess.run(line, check=False, capture_output=True).returncode:
            return None
        (folder / "an-hour").write_bytes((3600).to_bytes(8, "little"))
        environment = os.environ | {"LD_PRELOAD": str(library), "TORTURE_CLOCK": str(folder / "an-hour")}
        line = [sys.executable, "-c", "import time; print(time.time())"]
        output = subprocess.run(line, check=False, capture_output=True, env=environment).stdout
        return library if output and float(output) - time.time() > 3000 else None

    @staticmethod
    def _can_strace():
        if shutil.which("strace") is None:
            return False
        line = ["strace", "-e", "inject=fsync:error=EIO", "-o", "/dev/null", sys.executable, "-c", "pass"]
        return subprocess.run(line, check=False, capture_output=True).returncode == 0

    @staticmethod
    def _can_mount(folder):
        mount_point = folder / "mount"
        mount_point.mkdir()
        line = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)]
        if os.geteuid() or shutil.which("mount") is None or subprocess.run(line, check=False).returncode:
            return False
        return subprocess.run(["umount", str(mount_point)], check=False).returncode == 0

    @staticmethod
    def _unprivileged_prefix():
        """Return the prefix of a command that makes file modes apply to it, which root ignores; None if impossible."""
        if os.geteuid():
            return []
        line = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
        if shutil.which("setpriv") and subprocess.run([*line, "true"], check=False).returncode == 0:
            return line
        return None
