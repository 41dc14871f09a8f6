package policy

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// sandboxConfig is what the broker tells a worker about its confinement.
type sandboxConfig struct {
	Parent     int    `json:"parent"`     // the broker's pid
	Namespaces bool   `json:"namespaces"` // the worker was started in empty ones
	Memory     uint64 `json:"memory"`     // bytes beyond what the worker has at its start
}

// confinement is the answer: what is in force.
type confinement struct {
	Applied []string `json:"applied"`
	Error   string   `json:"error,omitempty"`
}

const (
	maxStack       = 16 << 20
	cpuSeconds     = 600 // over a worker's whole life; it retires at half of it
	maxWorkerFiles = 16
	// Threads of all workers count against the one unprivileged user; what
	// keeps a worker from starting a process is the system call filter.
	maxWorkerTasks = 4096
	nobody         = 65534
)

// confine gives up everything a worker does not need, for all threads and for
// good. It runs before any policy is read. What every kernel has is demanded;
// namespaces and Landlock add a second wall where they exist.
func confine(cfg sandboxConfig) ([]string, error) {
	var applied []string

	// The pages in use now are the program itself (under the race detector
	// a great many), so the limit is on what comes on top.
	base, err := dataSize()
	if err != nil {
		return nil, fmt.Errorf("cannot read its own size: %w", err)
	}
	debug.SetMaxStack(maxStack)
	debug.SetMemoryLimit(int64(cfg.Memory / 4 * 3))

	if cfg.Namespaces {
		// Inside some containers root may make namespaces but not mount in
		// them; the walls below do without.
		if err := emptyRoot(); err != nil {
			applied = append(applied, "namespaces (root not emptied: "+err.Error()+")")
		} else {
			applied = append(applied, "namespaces")
		}
	}
	for _, l := range []struct {
		resource int
		max      uint64
	}{
		{unix.RLIMIT_DATA, base + cfg.Memory},
		{unix.RLIMIT_CPU, cpuSeconds},
		{unix.RLIMIT_NOFILE, maxWorkerFiles},
		{unix.RLIMIT_NPROC, maxWorkerTasks},
		{unix.RLIMIT_CORE, 0},
		{unix.RLIMIT_FSIZE, 0},
		{unix.RLIMIT_MSGQUEUE, 0},
	} {
		if err := unix.Setrlimit(l.resource, &unix.Rlimit{Cur: l.max, Max: l.max}); err != nil {
			return nil, fmt.Errorf("cannot limit resource %d: %w", l.resource, err)
		}
	}
	applied = append(applied, "rlimits")

	if os.Getuid() == 0 {
		if err := dropRoot(); err != nil {
			return nil, fmt.Errorf("cannot drop root: %w", err)
		}
		applied = append(applied, "unprivileged")
	}
	// Changing the user cleared both.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("cannot become undumpable: %w", err)
	}
	if err := dieWith(cfg.Parent); err != nil {
		return nil, err
	}

	version, err := noFiles()
	if err != nil {
		return nil, fmt.Errorf("cannot apply Landlock: %w", err)
	}
	if version > 0 {
		applied = append(applied, "landlock "+strconv.Itoa(version))
	}
	if err := filterSyscalls(); err != nil {
		return nil, err
	}
	return append(applied, "no-new-privileges", "seccomp"), nil
}

// dieWith makes the kernel kill this process when the broker's thread that
// started it ends; the broker keeps that thread for its whole life. The main
// thread must call it: the signal's setting is the thread's.
func dieWith(parent int) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("cannot die with its parent: %w", err)
	}
	if os.Getppid() != parent {
		return errors.New("its parent is gone")
	}
	return nil
}

func dropRoot() error {
	if err := syscall.Setgroups(nil); err != nil {
		return err
	}
	if err := syscall.Setresgid(nobody, nobody, nobody); err != nil {
		return err
	}
	return syscall.Setresuid(nobody, nobody, nobody)
}

// emptyRoot leaves a mount namespace that holds one empty read-only tmpfs.
func emptyRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make / private: %w", err)
	}
	// Any directory that is sure to exist will do: it is only stood on.
	const stand = "/proc"
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if err := unix.Mount("tmpfs", stand, "tmpfs", flags, "size=4k,mode=555"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	if err := unix.Chdir(stand); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	// The old root lies on top of the new one, and everything else with it.
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	return unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|flags, "")
}

// dataSize is what RLIMIT_DATA counts of this process, in bytes.
func dataSize() (uint64, error) {
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	return statmField(text, 5)
}

// statmField is a field of /proc/PID/statm in bytes (proc(5)): 1 is the
// resident set, 5 data and stack.
func statmField(text []byte, n int) (uint64, error) {
	fields := bytes.Fields(text)
	if len(fields) <= n {
		return 0, fmt.Errorf("statm has %d fields", len(fields))
	}
	pages, err := strconv.ParseUint(string(fields[n]), 10, 64)
	return pages * uint64(os.Getpagesize()), err
}

// workerSyscalls are what the Go runtime, and the C runtime of builds that have
// one, call once they run. Nothing on it opens, connects, starts or signals
// another process.
var workerSyscalls = []string{
	"brk", "clock_gettime", "clock_nanosleep", "close", "epoll_create1", "epoll_ctl", "epoll_pwait", "eventfd2",
	"exit", "exit_group", "fcntl", "fstat", "futex", "getpid", "getppid", "getrandom", "getrusage", "gettid",
	"gettimeofday", "madvise", "mincore", "munmap", "nanosleep", "pipe2", "read", "restart_syscall",
	"rseq", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield",
	"set_robust_list", "sigaltstack", "write",
}

const prSetVMA = 0x53564d41 // Go names its mappings with it

func workerPolicy() seccomp.Policy {
	when := func(name string, argument uint32, operation seccomp.Operation, value uint64) seccomp.NameWithConditions {
		return seccomp.NameWithConditions{
			Name:       name,
			Conditions: seccomp.ArgumentConditions{{Argument: argument, Operation: operation, Value: value}},
		}
	}
	return seccomp.Policy{
		DefaultAction: seccomp.ActionErrno, // EPERM
		Syscalls: []seccomp.SyscallGroup{
			{Action: seccomp.ActionAllow, Names: workerSyscalls},
			{Action: seccomp.ActionAllow, NamesWithCondtions: []seccomp.NameWithConditions{
				// a thread, never a process
				when("clone", 0, seccomp.BitsSet, unix.CLONE_THREAD),
				// memory, never code
				when("mmap", 2, seccomp.BitsNotSet, unix.PROT_EXEC),
				when("mprotect", 2, seccomp.BitsNotSet, unix.PROT_EXEC),
				when("prctl", 0, seccomp.Equal, prSetVMA),
			}},
			// The runtime aborts by signalling its own threads; the first
			// argument is the process.
			{Action: seccomp.ActionAllow, NamesWithCondtions: []seccomp.NameWithConditions{
				when("tgkill", 0, seccomp.Equal, uint64(os.Getpid())),
			}},
			// The C runtime falls back to clone, whose flags a filter can see.
			{Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: []string{"clone3"}},
		},
	}
}

// filterSyscalls applies the filter and no-new-privileges to all threads at
// once. The library would load it too, but takes a thread that could not be
// covered, which the kernel reports as a positive number, for success.
func filterSyscalls() error {
	policy := workerPolicy()
	instructions, err := policy.Assemble()
	if err != nil {
		return fmt.Errorf("cannot assemble the system call filter: %w", err)
	}
	raw, err := bpf.Assemble(instructions)
	if err != nil {
		return fmt.Errorf("cannot assemble the system call filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	// Of the calling thread; TSYNC carries it over to the others.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot set no-new-privileges: %w", err)
	}
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return fmt.Errorf("cannot apply the system call filter: %w", errno)
	}
	if thread != 0 {
		return fmt.Errorf("cannot apply the system call filter to thread %d", thread)
	}
	return nil
}
