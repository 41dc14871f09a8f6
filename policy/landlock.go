package policy

import (
	"errors"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The bits that each version of Landlock's ABI knows
// (Documentation/userspace-api/landlock.rst). Later versions add bits of their
// own, which the system call filter covers.
func landlockAttr(version int) unix.LandlockRulesetAttr {
	bits := func(n int) uint64 { return 1<<n - 1 }
	attr := unix.LandlockRulesetAttr{Handled_access_fs: bits(13)}
	switch {
	case version >= 5:
		attr.Handled_access_fs = bits(16)
	case version >= 3:
		attr.Handled_access_fs = bits(15)
	case version >= 2:
		attr.Handled_access_fs = bits(14)
	}
	if version >= 4 {
		attr.Handled_access_net = bits(2)
	}
	if version >= 6 {
		attr.Scoped = bits(2)
	}
	return attr
}

// landlockTSync makes ABI 8 and later cover all threads by themselves.
const landlockTSync = unix.LANDLOCK_RESTRICT_SELF_TSYNC

// noFiles takes away all access to files, TCP ports, abstract sockets and other
// processes that Landlock can take away: a rule set without a rule. The version
// is 0 where there is no Landlock, or where it could not cover every thread:
// before ABI 8 that takes a Go program without C in it.
func noFiles() (version int, err error) {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0, nil // ENOSYS, or EOPNOTSUPP where it was switched off at boot
	}
	version = int(v)
	attr := landlockAttr(version)
	size := unsafe.Offsetof(attr.Quiet_access_fs)
	switch {
	case version < 4:
		size = unsafe.Offsetof(attr.Handled_access_net)
	case version < 6:
		size = unsafe.Offsetof(attr.Scoped)
	}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if errno != 0 {
		return 0, errno
	}
	defer func() { _ = unix.Close(int(fd)) }()
	if version >= 8 {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return 0, err
		}
		if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, landlockTSync, 0); errno != 0 {
			return 0, errno
		}
		return version, nil
	}
	_, _, errno = syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if errors.Is(errno, unix.ENOTSUP) {
		return 0, nil
	}
	if errno != 0 {
		return 0, errno
	}
	if _, _, errno = syscall.AllThreadsSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return 0, errno
	}
	return version, nil
}
