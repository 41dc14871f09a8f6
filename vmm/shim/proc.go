package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/failpoint"
)

// Proc identifies a process beyond the reuse of its number.
type Proc struct {
	PID int `json:"pid"`
	// Start is the process's start in clock ticks after boot (field 22 of
	// /proc/PID/stat).
	Start uint64 `json:"start"`
	// BootID is the boot that Start counts from.
	BootID string `json:"boot_id,omitempty"`
	// Role says what it is: shim, vmm, or fs/<object>.
	Role string `json:"role,omitempty"`
}

// Files of a runtime directory.
const (
	sockName      = "shim.sock"
	identName     = "shim.json"
	recordsName   = "processes.json"
	vmmSockName   = "vmm.sock"
	vsockName     = "vsock.sock"
	serialName    = "serial.sock"
	consoleName   = "console.sock"
	consoleLog    = "console.log"
	shimLogName   = "shim.log"
	vmmLogName    = "vmm.log"
	fsDirName     = "fs"
	rootDirName   = "root"
	cgroupName    = "cgroup"
	maxRecordFile = 1 << 20
)

// startTime reads when the process began. The command name, which the process
// chooses, is skipped by its last parenthesis.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, fmt.Errorf("/proc/%d/stat is malformed", pid)
	}
	fields := bytes.Fields(b[i+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat is malformed", pid)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

var errOtherProcess = errors.New("the process is gone or another one has its number")

// open returns a pidfd of exactly this process. The number is looked up, then
// the start time is compared: once they agree, the descriptor is right for
// ever. One that has ended is gone, however late its parent collects it.
func (p Proc) open() (*os.File, error) {
	id, err := clock.BootID()
	if err != nil {
		return nil, err
	}
	if p.PID <= 1 || p.BootID != id {
		return nil, errOtherProcess
	}
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, errOtherProcess
	}
	start, err := startTime(p.PID)
	if err != nil || start != p.Start || pidfdExited(fd) {
		_ = unix.Close(fd)
		return nil, errOtherProcess
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// waitPidfd blocks the goroutine, not a thread, until the process has exited.
func waitPidfd(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool { return pidfdExited(int(fd)) })
}

func pidfdExited(fd int) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

// records is processes.json: who belongs to this directory.
type records struct {
	Procs []Proc `json:"procs"`
}

func writeJSON(dir, name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return replaceFile(dir, name, append(b, '\n'))
}

// replaceFile replaces the file at once. It need not survive a power cut, after
// which no process is left either.
func replaceFile(dir, name string, b []byte) error {
	tmp := filepath.Join(dir, "."+name+".new")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	failpoint.Hit("shim.file.written")
	return os.Rename(tmp, filepath.Join(dir, name))
}

func readJSON(dir, name string, v any) error {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() > maxRecordFile {
		return fmt.Errorf("%s is longer than %d bytes", name, maxRecordFile)
	}
	return json.NewDecoder(f).Decode(v)
}

// killPidfd sends SIGKILL to exactly that process.
func killPidfd(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var killErr error
	if err := raw.Control(func(fd uintptr) {
		killErr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0)
	}); err != nil {
		return err
	}
	if errors.Is(killErr, unix.ESRCH) {
		return nil
	}
	return killErr
}
