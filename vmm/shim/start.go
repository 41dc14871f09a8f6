package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/failpoint"
)

// StartOptions says which shim to start.
type StartOptions struct {
	// Binary is the shim's program.
	Binary string
	Spec   Spec
	// Kernel, Initrd and Disks are the opened boot files. They stay the
	// caller's. The VMM opens them again through their descriptors, at every
	// start of the VM, and never by a name.
	Kernel, Initrd *os.File
	Disks          []*os.File
	Log            *slog.Logger
}

// Descriptors that a shim inherits.
const (
	specFD  = 3
	readyFD = 4
	bootFD  = 5 // kernel, then initrd where Spec.Initrd, then the disks
)

// Start starts a shim that outlives the caller and returns when its VM has
// booted. The runtime directory must not be in use; Reap makes it so. Its error
// leaves it to the caller, who knows the VM's name, to say what failed.
func Start(ctx context.Context, o StartOptions) (*Client, error) {
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if err := o.check(); err != nil {
		return nil, err
	}
	dir := o.Spec.RuntimeDir
	if err := makeRuntimeDir(dir); err != nil {
		return nil, err
	}
	failpoint.Hit("shim.start.dir")
	cg, err := createCgroup(dir, o.Spec.VM.String())
	if err != nil {
		log.Info("VM runs without a cgroup of its own", "vm", o.Spec.VM, "reason", err)
	}
	failpoint.Hit("shim.start.cgroup")
	proc, ready, err := o.spawn(cg)
	failpoint.Hit("shim.start.spawned")
	if err != nil && cg != nil {
		log.Info("VM runs without a cgroup of its own", "vm", o.Spec.VM, "reason", err)
		if err := errors.Join(removeCgroup(dir), os.Remove(filepath.Join(dir, cgroupName))); err != nil {
			return nil, errors.Join(err, Reap(dir))
		}
		proc, ready, err = o.spawn(nil)
	}
	if err != nil {
		return nil, errors.Join(err, Reap(dir))
	}
	defer ready.Close()
	c, err := awaitBoot(ctx, dir, ready)
	if err != nil {
		// The caller has nothing yet, so nothing may be left.
		_ = proc.Kill()
		return nil, errors.Join(err, Reap(dir))
	}
	return c, nil
}

func (o *StartOptions) check() error {
	s := &o.Spec
	if err := s.check(); err != nil {
		return err
	}
	if o.Kernel == nil || s.Initrd != (o.Initrd != nil) || len(s.Disks) != len(o.Disks) {
		return errors.New("the opened boot files are not those of the spec")
	}
	return nil
}

// spawn forks the shim into a session and cgroup of its own.
func (o *StartOptions) spawn(cg *cgroup) (*os.Process, *os.File, error) {
	dir := o.Spec.RuntimeDir
	spec, err := specFile(&o.Spec)
	if err != nil {
		return nil, nil, err
	}
	defer spec.Close()
	ready, readyW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer readyW.Close()
	logFile, err := os.OpenFile(filepath.Join(dir, shimLogName), os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		_ = ready.Close()
		return nil, nil, err
	}
	defer logFile.Close()
	// Not exec.CommandContext: the shim outlives the request, and the broker.
	cmd := exec.Command(o.Binary, "serve") //nolint:noctx // see above
	cmd.Dir = dir
	cmd.Env = environment()
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.ExtraFiles = append([]*os.File{spec, readyW, o.Kernel}, bootFiles(o)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if cg != nil {
		fd, err := cg.open(cgroupShim)
		if err != nil {
			_ = ready.Close()
			return nil, nil, err
		}
		defer fd.Close()
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(fd.Fd())
	}
	if err := cmd.Start(); err != nil {
		_ = ready.Close()
		return nil, nil, err
	}
	// While the caller lives it is the shim's parent and collects it. The
	// goroutine ends with the shim.
	go func() { _ = cmd.Wait() }()
	return cmd.Process, ready, nil
}

// environment is the caller's, without what its service manager said to it
// alone.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "NOTIFY_SOCKET=") || strings.HasPrefix(v, "WATCHDOG_") || strings.HasPrefix(v, "LISTEN_")
	})
}

func bootFiles(o *StartOptions) []*os.File {
	var files []*os.File
	if o.Initrd != nil {
		files = append(files, o.Initrd)
	}
	return append(files, o.Disks...)
}

// specFile holds the spec in memory, so that nothing on the way can change it.
func specFile(s *Spec) (*os.File, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("shim-spec", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "shim-spec")
	if _, err := f.WriteAt(b, 0); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// awaitBoot waits until the shim serves its socket and its VM runs.
func awaitBoot(ctx context.Context, dir string, ready *os.File) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	word, err := io.ReadAll(io.LimitReader(ready, 16))
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, err
	case !bytes.Equal(word, []byte(readyWord)):
		return nil, fmt.Errorf("the shim ended at once: %s", lastLine(filepath.Join(dir, shimLogName)))
	}
	failpoint.Hit("shim.start.ready")
	c, err := dial(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, lastLine(filepath.Join(dir, shimLogName)))
	}
	seen := uint64(0)
	for {
		s, err := c.Watch(ctx, seen)
		switch {
		case err != nil:
		case s.Phase == Running:
			return c, nil
		case s.Phase == Stopping || s.Phase == Stopped:
			err = errors.New(s.ExitReason)
		default:
			seen = s.Seq
			continue
		}
		c.Close()
		return nil, err
	}
}

const readyWord = "ready"

// lastLine is the end of a log, for an error message.
func lastLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return "no log"
	}
	defer f.Close()
	const tail = 1024
	if info, err := f.Stat(); err == nil && info.Size() > tail {
		_, _ = f.Seek(-tail, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, tail))
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.ToValidUTF8(strings.TrimSpace(lines[len(lines)-1]), "?")
}

// makeRuntimeDir makes the directory, or takes an empty private one. What is
// in it beforehand may only be the broker's own vsock listeners.
func makeRuntimeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() || info.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()) {
		return fmt.Errorf("%s is not a directory of our own", dir)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return err
	}
	for _, name := range []string{identName, recordsName, sockName} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return fmt.Errorf("%s is in use: it has %s", dir, name)
		}
	}
	return nil
}
