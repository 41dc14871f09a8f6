package execclient

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"spectrum-os.org/broker/agents/wire"
)

// Port is the vsock port of the service.
const Port = 9000

// Command is the one message of a client. Bytes travel as base64.
type Command struct {
	Argv  []string `json:"argv"`
	Stdin []byte   `json:"stdin,omitempty"`
	Env   []string `json:"env,omitempty"` // added to the service's own
	UID   uint32   `json:"uid,omitempty"` // also the group
}

// Frame is one message of the service: some output, or the end.
type Frame struct {
	Stdout []byte `json:"stdout,omitempty"`
	Stderr []byte `json:"stderr,omitempty"`
	Exit   *int   `json:"exit,omitempty"` // 128+n: ended by signal n
	Error  string `json:"error,omitempty"`
}

// Result is what a command that ended left.
type Result struct {
	Stdout, Stderr []byte
	Exit           int
}

// Text is the standard output without its last newline.
func (r Result) Text() string { return strings.TrimSuffix(string(r.Stdout), "\n") }

// ErrBroken says that the connection ended before the command did.
var ErrBroken = errors.New("the guest's exec service went away")

// ExitError is a command's status that is not 0.
type ExitError struct {
	Argv []string
	Result
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("guest: %s: exit %d: %s", strings.Join(e.Argv, " "), e.Exit, bytes.TrimSpace(e.Stderr))
}

// Client runs commands in one guest.
type Client struct{ dial wire.Dialer }

// New uses dial to reach the service.
func New(dial wire.Dialer) *Client { return &Client{dial: dial} }

// NewHybrid reaches the guest whose hybrid-vsock socket is at path.
func NewHybrid(path string) *Client {
	return New(func(ctx context.Context) (net.Conn, error) { return wire.DialHybrid(ctx, path, Port) })
}

// Await returns when the guest runs commands, or ctx's end.
func (c *Client) Await(ctx context.Context) error {
	for {
		// A vsock that the guest has not set up yet may swallow a connection.
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := c.Run(try, "true")
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the guest does not answer: %w", errors.Join(ctx.Err(), err))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Run runs argv and waits. A status other than 0 is no error.
func (c *Client) Run(ctx context.Context, argv ...string) (Result, error) {
	return c.RunCommand(ctx, Command{Argv: argv})
}

// RunCommand is Run with all that a command may have.
func (c *Client) RunCommand(ctx context.Context, cmd Command) (Result, error) {
	p, err := c.Start(ctx, cmd)
	if err != nil {
		return Result{}, err
	}
	defer p.Kill()
	return p.Wait()
}

// Output runs argv and returns [Result.Text]; a status other than 0 is an
// [*ExitError].
func (c *Client) Output(ctx context.Context, argv ...string) (string, error) {
	r, err := c.Run(ctx, argv...)
	if err == nil && r.Exit != 0 {
		err = &ExitError{Argv: argv, Result: r}
	}
	return r.Text(), err
}

// Shell runs a line of sh as Output does.
func (c *Client) Shell(ctx context.Context, line string) (string, error) {
	return c.Output(ctx, "sh", "-c", line)
}

// Process is a command that was started. Its output is kept whole.
type Process struct {
	conn net.Conn
	stop func() bool
	done chan struct{}

	mu      sync.Mutex
	changed chan struct{}
	result  Result
	err     error
}

// Start starts cmd; the end of ctx kills it.
func (c *Client) Start(ctx context.Context, cmd Command) (*Process, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	p := &Process{conn: conn, done: make(chan struct{}), changed: make(chan struct{})}
	p.stop = context.AfterFunc(ctx, func() { _ = conn.Close() })
	if err := json.NewEncoder(conn).Encode(cmd); err != nil {
		p.stop()
		_ = conn.Close()
		return nil, fmt.Errorf("%w: %w", ErrBroken, err)
	}
	go p.read()
	return p, nil
}

func (p *Process) read() {
	defer close(p.done)
	dec := json.NewDecoder(p.conn)
	for {
		var f Frame
		err := dec.Decode(&f)
		if f.Error != "" {
			err = fmt.Errorf("guest: %s", f.Error)
		} else if err != nil {
			err = fmt.Errorf("%w: %w", ErrBroken, err)
		}
		if p.note(f, err) {
			return
		}
	}
}

// note keeps what a frame said and wakes those who wait for it.
func (p *Process) note(f Frame, err error) (last bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.result.Stdout = append(p.result.Stdout, f.Stdout...)
	p.result.Stderr = append(p.result.Stderr, f.Stderr...)
	p.err = err
	if f.Exit != nil {
		p.result.Exit = *f.Exit
	}
	close(p.changed)
	p.changed = make(chan struct{})
	return err != nil || f.Exit != nil
}

// Kill ends the command if it still runs.
func (p *Process) Kill() {
	p.stop()
	_ = p.conn.Close()
	<-p.done
}

// Done is closed when the command has ended or its connection has.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end.
func (p *Process) Wait() (Result, error) {
	<-p.done
	return p.Sofar()
}

// Sofar is what the command has put out until now.
func (p *Process) Sofar() (Result, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.result
	r.Stdout, r.Stderr = bytes.Clone(r.Stdout), bytes.Clone(r.Stderr)
	return r, p.err
}

// AwaitOutput returns once want stands in the standard output, io.EOF if the
// command ends without it.
func (p *Process) AwaitOutput(ctx context.Context, want string) error {
	for {
		p.mu.Lock()
		found, changed := bytes.Contains(p.result.Stdout, []byte(want)), p.changed
		p.mu.Unlock()
		if found {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-p.done:
			if r, err := p.Sofar(); !bytes.Contains(r.Stdout, []byte(want)) {
				return errors.Join(io.EOF, err)
			}
			return nil
		}
	}
}
