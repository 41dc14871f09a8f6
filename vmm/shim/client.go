package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// Spec is what a shim needs to run its VM.
type Spec struct {
	VM         uuid.UUID `json:"vm"`
	RuntimeDir string    `json:"runtime_dir"`
	// VMM and Virtiofsd are absolute paths of programs.
	VMM       string `json:"vmm"`
	Virtiofsd string `json:"virtiofsd"`
	MemoryMiB int    `json:"memory_mib"`
	VCPUs     int    `json:"vcpus"`
	// Segments is the number of PCI segments. Zero: DefaultSegments.
	Segments int        `json:"segments,omitempty"`
	Cmdline  string     `json:"cmdline,omitempty"`
	Initrd   bool       `json:"initrd,omitempty"`
	Disks    []DiskSpec `json:"disks,omitempty"`
	// CutDeadline is how long a guest may take to let go of an object before
	// what serves it is killed. Zero: DefaultCutDeadline.
	CutDeadline time.Duration `json:"cut_deadline_ns,omitempty"`
	// Stretch multiplies every timeout, for slow machines. Zero: 1.
	Stretch float64 `json:"stretch,omitempty"`
}

// DiskSpec describes the disk at the same index of StartOptions.Disks.
type DiskSpec struct {
	ReadOnly bool `json:"read_only,omitempty"`
}

// Defaults of a Spec.
const (
	DefaultSegments    = 5
	DefaultCutDeadline = 2 * time.Second
)

// Client talks to one shim. Each call is a connection of its own, so that no
// call waits for another.
type Client struct {
	dir    *os.File
	proc   Proc
	pidfd  *os.File
	exited chan struct{}
	dead   bool // the process has ended; may be read once exited is closed
	close  sync.Once
}

// ErrNoShim: no shim of this user serves the directory, now or later. Other
// errors of Dial may pass.
var ErrNoShim = errors.New("no shim runs there")

// Dial adopts the shim that serves a runtime directory. Its process must be
// the one that shim.json names, and run as the caller's user: a socket file
// alone proves nothing.
func Dial(runtimeDir string) (*Client, error) {
	c, err := dial(runtimeDir)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the shim of %s: %w", runtimeDir, err)
	}
	return c, nil
}

func dial(runtimeDir string) (*Client, error) {
	if err := private(runtimeDir); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoShim, err)
	}
	var ident Proc
	if err := readJSON(runtimeDir, identName, &ident); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrNoShim, err)
	} else if err != nil {
		return nil, err
	}
	dir, err := os.Open(runtimeDir)
	if err != nil {
		return nil, err
	}
	pidfd, err := ident.open()
	if err != nil {
		_ = dir.Close()
		if errors.Is(err, errOtherProcess) {
			err = fmt.Errorf("%w: %w", ErrNoShim, err)
		}
		return nil, err
	}
	c := &Client{dir: dir, proc: ident, pidfd: pidfd, exited: make(chan struct{})}
	go func() {
		defer close(c.exited)
		c.dead = waitPidfd(pidfd) == nil
	}()
	conn, err := c.connect()
	if err != nil {
		c.Close()
		return nil, err
	}
	_ = conn.Close()
	return c, nil
}

// private checks that nobody else can have put anything into a directory.
func private(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return err
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is not a directory", dir)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to user %d", dir, st.Uid)
	case st.Mode&0o022 != 0:
		return fmt.Errorf("%s is writable by others", dir)
	}
	return nil
}

// Close lets go of the shim, which runs on. Exited is closed as well.
func (c *Client) Close() {
	c.close.Do(func() {
		_ = c.pidfd.Close()
		_ = c.dir.Close()
	})
}

// Exited is closed when the shim's process has ended, and with it everything
// of its VM.
func (c *Client) Exited() <-chan struct{} { return c.exited }

// Proc is the shim's process.
func (c *Client) Proc() Proc { return c.proc }

// Kill ends the shim, and with it everything of its VM, without its help.
func (c *Client) Kill() error { return killPidfd(c.pidfd) }

func (c *Client) connect() (*net.UnixConn, error) {
	conn, err := dialUnix("unixpacket", c.dir, sockName)
	if err != nil {
		return nil, err
	}
	cred, err := peerCred(conn)
	if err == nil && int(cred.Pid) != c.proc.PID {
		err = fmt.Errorf("%w: process %d serves the socket of process %d", ErrNoShim, cred.Pid, c.proc.PID)
	}
	if err == nil && int(cred.Uid) != os.Geteuid() {
		err = fmt.Errorf("%w: user %d serves the socket", ErrNoShim, cred.Uid)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// State tells what exists now.
func (c *Client) State(ctx context.Context) (State, error) {
	return c.stateCall(ctx, &request{Op: opState})
}

// Watch returns once the state's Seq is not seen, or with an error when the
// shim is gone. Now and then it returns an unchanged state.
func (c *Client) Watch(ctx context.Context, seen uint64) (State, error) {
	return c.stateCall(ctx, &request{Op: opWatch, Seen: seen})
}

// Put makes the object exist and returns when its device is attached. It is
// idempotent by id and generation. f is opened with O_PATH and stays the
// caller's.
func (c *Client) Put(ctx context.Context, o Object, f *os.File) (ObjectState, error) {
	if f == nil {
		return ObjectState{}, refuse(CodeBadRequest, "object %s has no descriptor", o.ID)
	}
	return c.objectCall(ctx, &request{Op: opPut, Object: &o}, f)
}

// Remove ends the object and returns when no process serves it any more: by
// itself, or killed at the deadline, which ObjectState.Killed tells.
func (c *Client) Remove(ctx context.Context, id string, generation uint64) (ObjectState, error) {
	return c.objectCall(ctx, &request{Op: opRemove, ID: id, Generation: generation})
}

// Stop presses the power button, kills what is left after grace, and returns
// when the shim has exited.
func (c *Client) Stop(ctx context.Context, grace time.Duration) error {
	_, err := c.stateCall(ctx, &request{Op: opStop, GraceMS: grace.Milliseconds()})
	if err != nil {
		select {
		case <-c.exited:
			return nil
		default:
			return err
		}
	}
	select {
	case <-c.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Ping tells whether the shim answers.
func (c *Client) Ping(ctx context.Context) error {
	_, err := c.call(ctx, &request{Op: opPing})
	return err
}

func (c *Client) stateCall(ctx context.Context, r *request) (State, error) {
	rep, err := c.call(ctx, r)
	if err != nil {
		return State{}, err
	}
	if rep.State == nil {
		return State{}, errors.New("the shim's reply has no state")
	}
	return *rep.State, nil
}

func (c *Client) objectCall(ctx context.Context, r *request, files ...*os.File) (ObjectState, error) {
	rep, err := c.call(ctx, r, files...)
	if err != nil {
		return ObjectState{}, err
	}
	if rep.Object == nil {
		return ObjectState{}, errors.New("the shim's reply has no object")
	}
	return *rep.Object, nil
}

// exitSeen is how long after a shim's connection broke its end may still be
// unseen: a process that dies closes its sockets first.
const exitSeen = time.Second

func (c *Client) call(ctx context.Context, r *request, files ...*os.File) (*reply, error) {
	rep, err := c.exchange(ctx, r, files...)
	if err == nil && rep.Error != nil {
		return nil, rep.Error
	}
	if err != nil {
		switch {
		case ctx.Err() != nil:
			err = ctx.Err()
		case await(c.exited, exitSeen) && c.dead:
			err = fmt.Errorf("%w: %w", ErrNoShim, err)
		}
		return nil, fmt.Errorf("cannot %s at the shim: %w", r.Op, err)
	}
	return rep, nil
}

func (c *Client) exchange(ctx context.Context, r *request, files ...*os.File) (*reply, error) {
	conn, err := c.connect()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := sendPacket(conn, r, maxRequest, files...); err != nil {
		return nil, err
	}
	data, f, err := recvPacket(conn, maxReply)
	if f != nil {
		_ = f.Close()
	}
	if errors.Is(err, io.EOF) {
		return nil, errors.New("the shim closed the connection")
	}
	if err != nil {
		return nil, err
	}
	var rep reply
	if err := json.Unmarshal(data, &rep); err != nil {
		return nil, err
	}
	return &rep, nil
}
