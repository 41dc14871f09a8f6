package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/failpoint"
)

// launchArg makes the program a launcher: the process that turns into one
// child of the shim. It prepares itself, waits until the shim has it on
// record, and execs.
const launchArg = "launch"

// launchSpec is what the shim tells the launcher, after recording it.
type launchSpec struct {
	// FS asks for a virtiofsd in a root of its own. Otherwise Argv is
	// executed as it is, with the descriptors from payloadFD on.
	FS       bool     `json:"fs,omitempty"`
	Argv     []string `json:"argv"`
	ReadOnly bool     `json:"read_only,omitempty"`
	// SingleFile is as in Object.
	SingleFile string `json:"single_file,omitempty"`
	// NoFile limits the child's open files, further than the shim's own hard
	// limit does. Zero: as inherited.
	NoFile uint64 `json:"no_file,omitempty"`
}

// Descriptors of a launcher.
const (
	controlFD = 3 // the spec, to its end
	statusFD  = 4 // an error message; closed by a successful exec
	payloadFD = 5

	shareFD  = payloadFD     // fs: opened with O_PATH
	listenFD = payloadFD + 1 // fs: the bound and listening socket
	binaryFD = payloadFD + 2 // fs: virtiofsd
)

const maxLaunchSpec = 64 << 10

func isLauncher() bool { return len(os.Args) == 2 && os.Args[1] == launchArg }

// The parent-death signal, capabilities and seccomp filters belong to a
// thread. The launcher's main goroutine stays on the first one, which carries
// the signal that the shim asked for at the fork.
func init() {
	if isLauncher() {
		runtime.LockOSThread()
	}
}

// launchMain returns only when the child could not be started.
func launchMain() int {
	// From here on a shim that is gone is noticed: by the signal, or, if it
	// died before the signal was set, by the end of the pipe without a spec.
	err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	if err == nil {
		err = launch()
	}
	_, _ = os.NewFile(statusFD, "status").WriteString(err.Error())
	return 1
}

func launch() error {
	for _, fd := range []int{controlFD, statusFD} {
		unix.CloseOnExec(fd)
	}
	b, err := io.ReadAll(io.LimitReader(os.NewFile(controlFD, "control"), maxLaunchSpec+1))
	if err != nil {
		return err
	}
	if len(b) == 0 || len(b) > maxLaunchSpec {
		return errors.New("the shim gave no order")
	}
	failpoint.Hit("launch.ordered")
	var spec launchSpec
	if err := json.Unmarshal(b, &spec); err != nil {
		return err
	}
	if len(spec.Argv) == 0 {
		return errors.New("the order names no program")
	}
	if spec.NoFile > 0 {
		var limit syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			return err
		}
		limit.Max = min(limit.Max, spec.NoFile)
		limit.Cur = limit.Max
		// syscall's, which tells Exec to leave the limit alone.
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			return fmt.Errorf("cannot limit open files: %w", err)
		}
	}
	if spec.FS {
		return launchFS(&spec)
	}
	return execErr(spec.Argv[0], syscall.Exec(spec.Argv[0], spec.Argv, os.Environ()))
}

func execErr(what string, err error) error { return fmt.Errorf("cannot execute %s: %w", what, err) }

// launchFS becomes a virtiofsd that sees nothing but its share.
func launchFS(spec *launchSpec) error {
	bin := os.NewFile(binaryFD, spec.Argv[0])
	root, err := planRoot(bin, spec)
	if err != nil {
		return err
	}
	failpoint.Hit("launch.planned")
	if err := root.enter(); err != nil {
		return err
	}
	failpoint.Hit("launch.entered")
	if err := unix.Setgroups(nil); err != nil {
		return fmt.Errorf("cannot drop groups: %w", err)
	}
	// The listener becomes descriptor 3; all others end at exec.
	if err := unix.Dup3(listenFD, controlFD, 0); err != nil {
		return err
	}
	if err := unix.CloseRange(statusFD, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return err
	}
	if err := dropPrivileges(); err != nil {
		return err
	}
	path := fmt.Sprintf("/proc/self/fd/%d", binaryFD)
	return execErr(spec.Argv[0], syscall.Exec(path, spec.Argv, root.env()))
}

// fsCapabilities are what virtiofsd needs to act as a file's owner would, and
// to enter its chroot and then drop what it no longer needs. Without FSETID
// the kernel clears set-id bits on writes; without MKNOD and SETFCAP there are
// no devices and no file capabilities; without DAC_READ_SEARCH no file can be
// opened by its handle, past the share.
var fsCapabilities = map[uintptr]bool{
	unix.CAP_CHOWN: true, unix.CAP_DAC_OVERRIDE: true, unix.CAP_FOWNER: true,
	unix.CAP_SETGID: true, unix.CAP_SETUID: true,
	unix.CAP_SETPCAP: true, unix.CAP_SYS_CHROOT: true,
}

// dropPrivileges bounds the capabilities that exec will give, and installs
// the filter. It acts on this thread only, which is the one that execs.
func dropPrivileges() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot clear ambient capabilities: %w", err)
	}
	var keep [2]unix.CapUserData
	for c := uintptr(0); c <= 63; c++ {
		if fsCapabilities[c] {
			keep[c/32].Permitted |= 1 << (c % 32)
			keep[c/32].Effective |= 1 << (c % 32)
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // past the kernel's last capability
			break
		}
		if err != nil {
			return fmt.Errorf("cannot drop capability %d: %w", c, err)
		}
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capset(&hdr, &keep[0]); err != nil {
		return fmt.Errorf("cannot drop capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot set no_new_privs: %w", err)
	}
	return installFilter(fsFilter())
}
