package shim

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// archChecks are for the calls that arm64 does not have.
func archChecks(check func(string, error, error)) {
	raw := func(nr uintptr, name string, a, b uintptr) error {
		p, _ := unix.BytePtrFromString(name)
		if _, _, errno := unix.Syscall(nr, uintptr(unsafe.Pointer(p)), a, b); errno != 0 {
			return errno
		}
		return nil
	}
	check("chmod", raw(unix.SYS_CHMOD, "plain", 0o4755, 0), unix.EPERM)
	check("creat", raw(unix.SYS_CREAT, "new", 0o4755, 0), unix.EPERM)
	check("mkdir", raw(unix.SYS_MKDIR, "newdir", 0o2755, 0), unix.EPERM)
	check("mknod", raw(unix.SYS_MKNOD, "dev", unix.S_IFCHR|0o666, 0x103), unix.EPERM)
	check("open", raw(unix.SYS_OPEN, "new", unix.O_CREAT|unix.O_WRONLY, 0o4755), unix.EPERM)
	check("chmod plain", raw(unix.SYS_CHMOD, "plain", 0o755, 0), nil)
	// The x32 spelling of a call.
	check("x32 chmod", raw(0x40000000|unix.SYS_CHMOD, "plain", 0o4755, 0), unix.EPERM)
}
