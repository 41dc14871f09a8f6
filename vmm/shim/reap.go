package shim

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/failpoint"
)

// reapTimeout bounds the wait for killed processes, which end at once unless
// the kernel holds them.
const reapTimeout = 10 * time.Second

// Reap kills what a shim may have left, each process by its number and start
// time together, and removes the runtime directory. A shim that still lives
// is killed too. It is not an error when there is nothing.
func Reap(runtimeDir string) error {
	if _, err := os.Lstat(runtimeDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := reap(runtimeDir); err != nil {
		return fmt.Errorf("cannot clear %s: %w", runtimeDir, err)
	}
	return nil
}

func reap(dir string) error {
	var procs []Proc
	var ident Proc
	switch err := readJSON(dir, identName, &ident); {
	case err == nil:
		procs = append(procs, ident)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	// The shim goes first: it could start more.
	if err := killProcs(procs); err != nil {
		return err
	}
	failpoint.Hit("reap.shim")
	var rec records
	if err := readJSON(dir, recordsName, &rec); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := killProcs(rec.Procs); err != nil {
		return err
	}
	failpoint.Hit("reap.children")
	if err := removeCgroup(dir); err != nil {
		return err
	}
	failpoint.Hit("reap.cgroup")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	failpoint.Hit("reap.removed")
	return nil
}

// killProcs returns when all of them are gone.
func killProcs(procs []Proc) error {
	var errs []error
	for _, p := range procs {
		f, err := p.open()
		if err != nil {
			if !errors.Is(err, errOtherProcess) {
				errs = append(errs, err)
			}
			continue
		}
		errs = append(errs, killAndWait(f, p))
		_ = f.Close()
	}
	return errors.Join(errs...)
}

func killAndWait(f *os.File, p Proc) error {
	if err := killPidfd(f); err != nil {
		return fmt.Errorf("cannot kill %s (process %d): %w", p.Role, p.PID, err)
	}
	fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}
	for end := time.Now().Add(reapTimeout); ; {
		left := time.Until(end)
		if left <= 0 {
			return fmt.Errorf("%s (process %d) does not die", p.Role, p.PID)
		}
		n, err := unix.Poll(fds, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			return nil
		}
	}
}
