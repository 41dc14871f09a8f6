package shim

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The filter that every virtiofsd inherits, beside its own. Its own allows
// what a file server needs; this one refuses what would leave something
// behind that outlives the grant's harmlessness: set-id bits and device nodes.
// The kernel evaluates all filters and takes the strictest answer.
//
// openat2 keeps the mode behind a pointer, where no filter can see it, so it
// is answered as by a kernel that lacks it and virtiofsd uses openat. io_uring
// would open files past any filter.

const (
	setID      = unix.S_ISUID | unix.S_ISGID
	creatFlags = unix.O_CREAT | unix.O_TMPFILE&^unix.O_DIRECTORY
	retEPERM   = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	retENOSYS  = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	// Offsets in struct seccomp_data. Both architectures are little-endian.
	offNR   = 0
	offArch = 4
	offArgs = 16
)

// sysRule says what of one system call is refused.
type sysRule struct {
	nr   uint32
	body []unix.SockFilter
}

func stmt(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }

func jump(op uint16, k uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_K | op, K: k, Jt: yes, Jf: no}
}

// Modes and flags are 32 bits at most, and the kernel ignores the rest of the
// register.
func loadArg(arg uint32) unix.SockFilter {
	return stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offArgs+8*arg)
}

func ret(value uint32) unix.SockFilter { return stmt(unix.BPF_RET|unix.BPF_K, value) }

// refuseCall answers a whole call.
func refuseCall(nr, answer uint32) sysRule {
	return sysRule{nr, []unix.SockFilter{ret(answer)}}
}

// refuseSetID refuses a mode with a set-id bit.
func refuseSetID(nr, mode uint32) sysRule {
	return sysRule{nr, []unix.SockFilter{
		loadArg(mode),
		jump(unix.BPF_JSET, setID, 0, 1),
		ret(retEPERM),
		ret(unix.SECCOMP_RET_ALLOW),
	}}
}

// refuseDevice refuses a mode with a set-id bit or of a device.
func refuseDevice(nr, mode uint32) sysRule {
	return sysRule{nr, []unix.SockFilter{
		loadArg(mode),
		jump(unix.BPF_JSET, setID, 3, 0),
		stmt(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, unix.S_IFMT),
		jump(unix.BPF_JEQ, unix.S_IFCHR, 1, 0),
		jump(unix.BPF_JEQ, unix.S_IFBLK, 0, 1),
		ret(retEPERM),
		ret(unix.SECCOMP_RET_ALLOW),
	}}
}

// refuseCreate refuses a mode with a set-id bit where a file may be created.
func refuseCreate(nr, flags, mode uint32) sysRule {
	return sysRule{nr, []unix.SockFilter{
		loadArg(flags),
		jump(unix.BPF_JSET, creatFlags, 0, 3),
		loadArg(mode),
		jump(unix.BPF_JSET, setID, 0, 1),
		ret(retEPERM),
		ret(unix.SECCOMP_RET_ALLOW),
	}}
}

// fsFilter is the program for this architecture.
func fsFilter() []unix.SockFilter {
	rules := append([]sysRule{
		refuseSetID(unix.SYS_FCHMOD, 1),
		refuseSetID(unix.SYS_FCHMODAT, 2),
		refuseSetID(unix.SYS_FCHMODAT2, 2),
		refuseSetID(unix.SYS_MKDIRAT, 2),
		refuseDevice(unix.SYS_MKNODAT, 2),
		refuseCreate(unix.SYS_OPENAT, 2, 3),
		refuseCall(unix.SYS_OPENAT2, retENOSYS),
		refuseCall(unix.SYS_IO_URING_SETUP, retENOSYS),
		refuseCall(unix.SYS_OPEN_BY_HANDLE_AT, retEPERM),
		refuseCall(unix.SYS_SETXATTR, retEPERM),
		refuseCall(unix.SYS_LSETXATTR, retEPERM),
		refuseCall(unix.SYS_FSETXATTR, retEPERM),
		refuseCall(unix.SYS_SETXATTRAT, retEPERM),
	}, archRules()...)
	prog := []unix.SockFilter{
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offArch),
		jump(unix.BPF_JEQ, auditArch, 1, 0),
		ret(unix.SECCOMP_RET_KILL_PROCESS),
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offNR),
		// The x32 calls have numbers of their own; no other call has this bit.
		jump(unix.BPF_JSET, 0x40000000, 0, 1),
		ret(retEPERM),
	}
	for _, r := range rules {
		prog = append(prog, jump(unix.BPF_JEQ, r.nr, 0, uint8(len(r.body))))
		prog = append(prog, r.body...)
	}
	return append(prog, ret(unix.SECCOMP_RET_ALLOW))
}

// installFilter puts the filter on the calling thread, for good.
func installFilter(prog []unix.SockFilter) error {
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&fprog)), 0, 0)
	runtime.KeepAlive(prog)
	if err != nil {
		return fmt.Errorf("cannot install the system-call filter: %w", err)
	}
	return nil
}
