package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/failpoint"
)

// spawner forks every child of the shim, from one thread that is never given
// back: the parent-death signal is sent when the forking thread ends, so it
// must live exactly as long as the process.
type spawner struct {
	dir    string // runtime directory
	bootID string
	cgroup *os.File // of the children; nil: none
	launch time.Duration
	forks  chan fork

	mu   sync.Mutex
	live []Proc
}

type fork struct {
	attr  *syscall.ProcAttr
	reply chan<- forked
}

type forked struct {
	pid int
	err error
}

// child is a process that the shim started. It is collected by its owner
// goroutine, which then closes exited.
type child struct {
	Proc
	pidfd  *os.File
	exited chan struct{}
	status syscall.WaitStatus // valid once exited is closed
}

func newSpawner(dir string, cg *os.File, launch time.Duration) (*spawner, error) {
	id, err := clock.BootID()
	if err != nil {
		return nil, err
	}
	s := &spawner{dir: dir, bootID: id, cgroup: cg, launch: launch, forks: make(chan fork)}
	go s.thread()
	return s, nil
}

// thread runs for as long as the process.
func (s *spawner) thread() {
	runtime.LockOSThread()
	for f := range s.forks {
		pid, err := syscall.ForkExec("/proc/self/exe", []string{"spectrum-shim", launchArg}, f.attr)
		f.reply <- forked{pid, err}
	}
}

// launchOrder is what start starts.
type launchOrder struct {
	role  string
	spec  launchSpec
	files []*os.File // from payloadFD on
	log   string     // in the runtime directory
	flags uintptr    // CLONE_NEW…
}

// start forks a launcher, puts it on record, tells it what to become, and
// returns once it has.
func (s *spawner) start(o *launchOrder) (*child, error) {
	c, err := s.tryStart(o)
	if err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", o.role, err)
	}
	return c, nil
}

func (s *spawner) tryStart(o *launchOrder) (*child, error) {
	order, err := json.Marshal(&o.spec)
	if err != nil {
		return nil, err
	}
	control, controlW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer control.Close()
	defer controlW.Close()
	status, statusW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer status.Close()
	c, err := s.fork(o, control, statusW)
	_ = statusW.Close()
	if err != nil {
		return nil, err
	}
	failpoint.Hit("shim.fork.after")
	if err := s.record(c.Proc); err != nil {
		return nil, s.abandon(c, err)
	}
	failpoint.Hit("shim.fork.recorded")
	if _, err := controlW.Write(order); err != nil {
		return nil, s.abandon(c, err)
	}
	_ = controlW.Close()
	failpoint.Hit("shim.fork.ordered")
	_ = status.SetReadDeadline(time.Now().Add(s.launch))
	message, err := io.ReadAll(io.LimitReader(status, 4096))
	if err == nil && len(message) > 0 {
		err = errors.New(string(bytes.ToValidUTF8(message, []byte("?"))))
	}
	if err != nil {
		return nil, s.abandon(c, err)
	}
	return c, nil
}

func (s *spawner) fork(o *launchOrder, control, status *os.File) (*child, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	// O_APPEND, so that the shim can cut a log short under its writer.
	log, err := os.OpenFile(o.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	pidfd := -1
	sys := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Cloneflags: o.flags, PidFD: &pidfd}
	if s.cgroup != nil {
		sys.UseCgroupFD, sys.CgroupFD = true, int(s.cgroup.Fd())
	}
	fds := []uintptr{null.Fd(), log.Fd(), log.Fd(), control.Fd(), status.Fd()}
	for _, f := range o.files {
		fds = append(fds, f.Fd())
	}
	reply := make(chan forked, 1)
	s.forks <- fork{&syscall.ProcAttr{Env: os.Environ(), Files: fds, Sys: sys}, reply}
	r := <-reply
	runtime.KeepAlive(o.files)
	if r.err != nil {
		return nil, r.err
	}
	if pidfd < 0 {
		_ = syscall.Kill(r.pid, syscall.SIGKILL) // our own child, not yet collected
		_, _ = syscall.Wait4(r.pid, nil, 0, nil)
		return nil, errors.New("the kernel gave no pidfd")
	}
	start, err := startTime(r.pid)
	_ = unix.SetNonblock(pidfd, true) // so that the runtime polls it
	c := &child{
		Proc:  Proc{PID: r.pid, Start: start, BootID: s.bootID, Role: o.role},
		pidfd: os.NewFile(uintptr(pidfd), "pidfd"), exited: make(chan struct{}),
	}
	go s.collect(c)
	if err != nil {
		return nil, s.abandon(c, err)
	}
	return c, nil
}

// collect waits without holding a thread, which a hundred children would add
// up to.
func (s *spawner) collect(c *child) {
	defer close(c.exited)
	_ = waitPidfd(c.pidfd)
	for {
		_, err := syscall.Wait4(c.PID, &c.status, 0, nil)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	_ = c.pidfd.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live = slices.DeleteFunc(s.live, func(p Proc) bool { return p == c.Proc })
}

// abandon kills a child that did not become what it should.
func (s *spawner) abandon(c *child, err error) error {
	c.kill()
	<-c.exited
	return err
}

func (c *child) kill() { _ = killPidfd(c.pidfd) }

func (c *child) hasExited() bool {
	select {
	case <-c.exited:
		return true
	default:
		return false
	}
}

// record puts the process on file.
func (s *spawner) record(p Proc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live = append(s.live, p)
	return writeJSON(s.dir, recordsName, records{Procs: s.live})
}
