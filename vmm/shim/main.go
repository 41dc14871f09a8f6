package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/failpoint"
)

const usage = "spectrum-shim is started by spectrum-broker, once for each VM; it has no use by hand\n"

// termGrace is what a guest gets when the shim itself is told to end.
const termGrace = 10 * time.Second

// maxLog bounds each log in the runtime directory, which is memory. Guests can
// make some of the programs talk.
const (
	maxLog    = 1 << 20
	sweepTime = 5 * time.Second
)

// Main is the program spectrum-shim, of which every shim and every launcher is
// a process. It returns the exit status.
func Main() int {
	switch {
	case isLauncher():
		return launchMain()
	case len(os.Args) == 2 && os.Args[1] == "serve":
		return serveMain()
	}
	_, _ = os.Stderr.WriteString(usage)
	return 2
}

func serveMain() int {
	// The heap is a few hundred kilobytes: many small collections cost less
	// than memory that a hundred shims would keep.
	debug.SetGCPercent(25)
	debug.SetMemoryLimit(8 << 20)
	runtime.GOMAXPROCS(min(2, runtime.GOMAXPROCS(0)))
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := serveSpec(log); err != nil {
		log.Error("cannot serve", "error", err)
		_, _ = fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// serveSpec runs the VM that the inherited descriptors describe, to its end.
func serveSpec(log *slog.Logger) error {
	spec, boot, err := inherited()
	if err != nil {
		return err
	}
	if err := os.Chdir(spec.RuntimeDir); err != nil {
		return err
	}
	// Only the owner; the VMM's sockets are made with this too.
	unix.Umask(0o077)
	for _, dir := range []string{fsDirName, rootDirName} {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	failpoint.Hit("shim.begun")
	self, err := selfProc()
	if err != nil {
		return err
	}
	cg, err := noted(".")
	if err != nil {
		return err
	}
	var leaf *os.File
	if cg != nil {
		if leaf, err = cg.open(cgroupChildren); err != nil {
			return err
		}
	}
	sp, err := newSpawner(".", leaf, spec.stretch(launchLimit))
	if err != nil {
		return err
	}
	con, err := newConsole(log)
	if err != nil {
		return err
	}
	s := &server{
		spec: *spec, clock: clock.System{}, log: log, spawner: sp, cgroup: cg, boot: boot, console: con, self: self,
		stopping: make(chan struct{}), finished: make(chan struct{}), toldEnd: make(chan struct{}),
		deadlines: make(chan struct{}, 1), changed: make(chan struct{}), seq: 1, phase: Starting,
		objects: map[string]*object{}, buried: newGraveyard(),
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: sockName})
	if err != nil {
		return err
	}
	failpoint.Hit("shim.listening")
	if err := writeJSON(".", identName, self); err != nil {
		return err
	}
	failpoint.Hit("shim.identified")
	if err := tellReady(); err != nil {
		return err
	}
	failpoint.Hit("shim.ready")
	s.run(l)
	failpoint.Hit("shim.leave.before")
	return s.leave()
}

// tellReady lets Start go on. A starter that is gone is not an error.
func tellReady() error {
	f := os.NewFile(readyFD, "ready")
	_, err := f.WriteString(readyWord)
	if err != nil && !errors.Is(err, unix.EPIPE) {
		return err
	}
	return f.Close()
}

// run serves until the VM has ended and somebody knows it.
func (s *server) run(l *net.UnixListener) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	terms := make(chan os.Signal, 1)
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	signal.Notify(terms, syscall.SIGTERM, syscall.SIGINT)
	var tasks sync.WaitGroup
	tasks.Go(func() { s.listenConns(ctx, l) })
	tasks.Go(func() { s.keepDeadlines(ctx) })
	tasks.Go(func() { s.console.serve(ctx) })
	tasks.Go(func() { sweepLogs(ctx) })
	go s.runVM(ctx)
	select {
	case <-s.finished:
	case <-terms:
		s.stop(termGrace)
		<-s.finished
	}
	if await(s.toldEnd, lingerTime) {
		time.Sleep(tellTime) // others may be about to be told
	}
	cancel()
	tasks.Wait()
}

// leave removes every trace.
func (s *server) leave() error {
	var errs []error
	if s.cgroup != nil {
		errs = append(errs, s.cgroup.leave("."))
	}
	failpoint.Hit("shim.leave.cgroup")
	return errors.Join(append(errs, os.RemoveAll(s.spec.RuntimeDir))...)
}

func selfProc() (Proc, error) {
	id, err := clock.BootID()
	if err != nil {
		return Proc{}, err
	}
	start, err := startTime(os.Getpid())
	return Proc{PID: os.Getpid(), Start: start, BootID: id, Role: "shim"}, err
}

// inherited reads the spec and takes the boot files.
func inherited() (*Spec, []*os.File, error) {
	f := os.NewFile(specFD, "spec")
	if f == nil {
		return nil, nil, errors.New(strings.TrimSpace(usage))
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() > maxLaunchSpec {
		return nil, nil, errors.New(strings.TrimSpace(usage))
	}
	b := make([]byte, info.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, nil, fmt.Errorf("cannot read the spec: %w", err)
	}
	var spec Spec
	if err := decodeStrict(b, &spec); err != nil {
		return nil, nil, fmt.Errorf("cannot read the spec: %w", err)
	}
	if err := spec.check(); err != nil {
		return nil, nil, err
	}
	spec.fill()
	n := 1 + len(spec.Disks)
	if spec.Initrd {
		n++
	}
	boot := make([]*os.File, n)
	for i := range boot {
		unix.CloseOnExec(bootFD + i)
		boot[i] = os.NewFile(uintptr(bootFD+i), "boot")
	}
	unix.CloseOnExec(readyFD)
	return &spec, boot, nil
}

// sweepLogs cuts short what has grown too long. Every log is written with
// O_APPEND, so that its writer goes on at the new end.
func sweepLogs(ctx context.Context) {
	ticks := time.NewTicker(sweepTime)
	defer ticks.Stop()
	for {
		select {
		case <-ticks.C:
		case <-ctx.Done():
			return
		}
		for _, pattern := range []string{"*.log", fsDirName + "/*.log"} {
			names, _ := filepath.Glob(pattern)
			for _, name := range names {
				if info, err := os.Lstat(name); err == nil && info.Mode().IsRegular() && info.Size() > maxLog && name != consoleLog {
					_ = os.Truncate(name, 0)
				}
			}
		}
	}
}
