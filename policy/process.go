package policy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// errTimeout is a worker that was killed because it did not answer in time.
var errTimeout = errors.New("no answer in time")

// workerEnded is a worker that ended before it answered, and how.
type workerEnded struct{ how string }

func (e *workerEnded) Error() string { return e.how }

// spawner starts processes on one thread that lives as long as the engines do:
// the kernel ties a child's parent-death signal to the thread that started it.
type spawner struct {
	jobs chan func()
	done chan struct{}
	// Set when the kernel refused namespaces, so that later workers are
	// started without trying again.
	noNamespaces atomic.Bool
}

func newSpawner() *spawner {
	s := &spawner{jobs: make(chan func()), done: make(chan struct{})}
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		defer close(s.done)
		for job := range s.jobs {
			job()
		}
	}()
	return s
}

// close must come after every worker has ended.
func (s *spawner) close() {
	close(s.jobs)
	<-s.done
}

func (s *spawner) start(cmd *exec.Cmd) error {
	failed := make(chan error)
	s.jobs <- func() { failed <- cmd.Start() }
	return <-failed
}

// process is one worker. Its methods but kill are for one goroutine at a time.
type process struct {
	cmd     *exec.Cmd
	in      *os.File // requests
	out     *os.File // replies
	reader  *bufio.Reader
	stderr  *tail
	ended   chan struct{} // closed when it has been reaped and its stderr read
	exit    error         // valid then
	sandbox []string
	memory  uint64 // bytes it may use
	seq     uint32
	buf     []byte
	retire  bool
	began   time.Time
	watcher *time.Timer
	armed   atomic.Bool  // the watcher will run
	due     atomic.Int64 // when the request under way must be answered, since began; or one of the two below
	overRSS atomic.Bool
}

// inheritedNamespaces are made empty for each worker, where root may.
const inheritedNamespaces = syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS

// startProcess starts a worker and confines it. The deadline covers both.
func startProcess(s *spawner, argv []string, memory uint64, deadline time.Time) (*process, error) {
	if len(argv) == 0 {
		return nil, errors.New("no command line for policy workers is set")
	}
	namespaces := os.Getuid() == 0 && !s.noNamespaces.Load()
	p, err := launch(s, argv, namespaces)
	if err != nil && namespaces && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSPC)) {
		s.noNamespaces.Store(true)
		namespaces = false
		p, err = launch(s, argv, false)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot start a policy worker: %w", err)
	}
	p.memory = memory
	var reply confinement
	cfg := sandboxConfig{Parent: os.Getpid(), Namespaces: namespaces, Memory: memory}
	if err := p.call(opConfine, cfg, &reply, deadline); err != nil {
		p.close()
		return nil, fmt.Errorf("cannot confine a policy worker: %w", err)
	}
	if reply.Error != "" {
		p.close()
		return nil, fmt.Errorf("cannot confine a policy worker: %s", reply.Error)
	}
	p.sandbox = reply.Applied
	return p, nil
}

func launch(s *spawner, argv []string, namespaces bool) (*process, error) {
	p := &process{ended: make(chan struct{}), stderr: &tail{}}
	var files []*os.File
	closeAll := func() {
		for _, f := range files {
			_ = f.Close()
		}
	}
	pipe := func() (r, w *os.File, err error) {
		if r, w, err = os.Pipe(); err == nil {
			files = append(files, r, w)
		}
		return r, w, err
	}
	childIn, in, err := pipe()
	if err != nil {
		return nil, err
	}
	out, childOut, err := pipe()
	if err != nil {
		closeAll()
		return nil, err
	}
	childErr, errEnd, err := pipe()
	if err != nil {
		closeAll()
		return nil, err
	}
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = childIn, childOut, errEnd
	// One processor: a worker answers one question at a time, and a bomb should
	// not take more than one. No C-level or Go-level settings are inherited.
	p.cmd.Env = []string{"GOMAXPROCS=1", "GOTRACEBACK=none", "LANG=C.UTF-8"}
	p.cmd.Dir = "/"
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if namespaces {
		p.cmd.SysProcAttr.Cloneflags = inheritedNamespaces
	}
	if err := s.start(p.cmd); err != nil {
		closeAll()
		return nil, err
	}
	_, _, _ = childIn.Close(), childOut.Close(), errEnd.Close()
	p.began = time.Now()
	p.watcher = time.AfterFunc(time.Hour, p.watch)
	p.watcher.Stop()
	p.in, p.out, p.reader = in, out, bufio.NewReaderSize(out, 16<<10)
	var reading sync.WaitGroup
	reading.Go(func() {
		_, _ = io.Copy(p.stderr, childErr)
		_ = childErr.Close()
	})
	go func() {
		p.exit = p.cmd.Wait()
		reading.Wait()
		close(p.ended)
	}()
	return p, nil
}

// pid is for people to look at; signals go through the process's pidfd.
func (p *process) pid() int { return p.cmd.Process.Pid }

// kill ends it at once. os.Process signals by pidfd where the kernel has them,
// so that a reaped worker's pid, reused, is never hit.
func (p *process) kill() { _ = p.cmd.Process.Kill() }

// close ends it and waits: a worker has nothing to finish.
func (p *process) close() {
	p.kill()
	<-p.ended
	_, _ = p.in.Close(), p.out.Close()
}

func (p *process) dead() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// call is request for documents in JSON.
func (p *process) call(kind op, request, reply any, deadline time.Time) error {
	payload, err := json.Marshal(request)
	if err != nil {
		return err
	}
	answer, err := p.request(kind, payload, deadline)
	if err != nil {
		return err
	}
	return p.decode(answer, reply)
}

// decode reads a reply; a worker that answers something else than the
// protocol's is ended.
func (p *process) decode(answer []byte, reply any) error {
	if err := decodeReply(answer, reply); err != nil {
		p.kill()
		return &workerEnded{"answered with something else than the protocol's: " + err.Error()}
	}
	return nil
}

// decodeReply is strict: what a worker says is not trusted to be well formed.
func decodeReply(answer []byte, reply any) error {
	d := json.NewDecoder(bytes.NewReader(answer))
	d.DisallowUnknownFields()
	if err := d.Decode(reply); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one document")
	}
	return nil
}

// watchAfter is how long an answer may take before the worker's resident memory
// is looked at, and how often after that.
const watchAfter = 25 * time.Millisecond

// programMemory is what a worker has resident before it reads a policy, and to
// spare.
const programMemory = 96 << 20

// What due says when no request is under way, and of one that was too late.
const (
	nothingDue = 0
	overdue    = -1
)

// request sends one request and waits for its answer until the deadline. After
// any error the worker is dead.
func (p *process) request(kind op, payload []byte, deadline time.Time) ([]byte, error) {
	if err := p.send(kind, payload, deadline); err != nil {
		return nil, err
	}
	return p.receive(kind)
}

// send sends a request; receive must follow, unless it fails. It is the watcher
// that keeps the deadline: a timer of its own for each request would wake a thread
// each time, only to tell it how long it may sleep.
func (p *process) send(kind op, payload []byte, deadline time.Time) error {
	if len(payload) > maxRequest {
		return fmt.Errorf("%w: %d bytes", errFrameTooLong, len(payload))
	}
	p.seq++
	p.buf = appendFrame(p.buf[:0], frame{op: kind, seq: p.seq, payload: payload})
	if cap(p.buf) > 64<<10 {
		defer func() { p.buf = nil }() // of a load; not worth keeping
	}
	limit := time.Until(deadline)
	p.due.Store(max(1, int64(deadline.Sub(p.began))))
	if !p.armed.Swap(true) || limit < watchAfter {
		p.watcher.Reset(min(limit, watchAfter))
	}
	if _, err := p.in.Write(p.buf); err != nil {
		return p.failed(err)
	}
	return nil
}

// receive waits for the answer to what was sent.
func (p *process) receive(kind op) ([]byte, error) {
	f, err := readFrame(p.reader, maxReply)
	if err != nil {
		return nil, p.failed(err)
	}
	if p.due.Swap(nothingDue) == overdue {
		return nil, p.failed(os.ErrDeadlineExceeded)
	}
	if f.op&^opRetire != kind || f.seq != p.seq {
		return nil, p.failed(fmt.Errorf("answered %d/%d to %d/%d", f.op, f.seq, kind, p.seq))
	}
	p.retire = f.op&opRetire != 0
	return f.payload, nil
}

// watch kills the worker when it is asked for longer than it may be, or if its
// resident memory outgrows what it may use, whatever way around the resource limits
// it found. It runs until, once, no request is under way.
func (p *process) watch() {
	due := p.due.Load()
	if due == nothingDue {
		p.armed.Store(false)
		// One that began just now took it for armed.
		if due = p.due.Load(); due == nothingDue || p.armed.Swap(true) {
			return
		}
	}
	left := time.Duration(due) - time.Since(p.began)
	if due == overdue || left <= 0 && p.due.CompareAndSwap(due, overdue) {
		p.kill()
		return
	}
	if p.overgrown() {
		p.overRSS.Store(true)
		p.kill()
		return
	}
	p.watcher.Reset(max(0, min(left, watchAfter)))
}

// overgrown tells whether the worker has more memory than it may.
func (p *process) overgrown() bool {
	if raceDetector {
		return false
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.pid()))
	if err != nil || p.dead() {
		return false
	}
	rss, err := statmField(text, 1)
	return err == nil && rss > p.memory+programMemory
}

// failed kills the worker and says why it could not answer.
func (p *process) failed(err error) error {
	p.kill()
	<-p.ended
	late := p.due.Swap(nothingDue) == overdue
	switch {
	case p.overRSS.Load():
		return &workerEnded{"ran out of memory (killed)"}
	case late, errors.Is(err, os.ErrDeadlineExceeded):
		return errTimeout
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.EPIPE):
		return &workerEnded{p.obituary()}
	}
	return &workerEnded{err.Error()}
}

// obituary tells from its last words how a worker ended.
func (p *process) obituary() string {
	text := p.stderr.String()
	switch {
	case strings.Contains(text, "stack overflow"), strings.Contains(text, "stack exceeds"):
		return fmt.Sprintf("ran out of stack (%d MiB)", maxStack>>20)
	case strings.Contains(text, "out of memory"), strings.Contains(text, "cannot allocate memory"),
		strings.Contains(text, "failed to create new OS thread"), strings.Contains(text, "ThreadSanitizer"):
		return fmt.Sprintf("ran out of memory (%d MiB)", p.memory>>20)
	}
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	how := "ended"
	if p.exit != nil {
		how = p.exit.Error()
	}
	if line != "" {
		how += ": " + oneLine(line)
	}
	return how
}

// untilCancelled kills a worker that is not in force yet when its load is no
// longer wanted.
func (p *process) untilCancelled(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, p.kill)
}

// tail keeps the first and bounded part of what a worker writes to stderr: a
// crash says what it is in its first line.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if room := 4096 - len(t.buf); room > 0 {
		t.buf = append(t.buf, b[:min(room, len(b))]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
