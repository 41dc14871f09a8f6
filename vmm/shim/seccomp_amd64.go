package shim

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_X86_64

// archRules are for the calls that arm64 does not have.
func archRules() []sysRule {
	return []sysRule{
		refuseSetID(unix.SYS_CHMOD, 1),
		refuseSetID(unix.SYS_CREAT, 1),
		refuseSetID(unix.SYS_MKDIR, 1),
		refuseDevice(unix.SYS_MKNOD, 1),
		refuseCreate(unix.SYS_OPEN, 1, 2),
	}
}
