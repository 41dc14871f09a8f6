package wire

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
)

// Reasons why a call failed, apart from the context's and an [*AgentError].
var (
	// ErrNoDeadline: the caller gave a context that never ends.
	ErrNoDeadline = errors.New("a call to a guest needs a deadline")
	// ErrUnreachable: no agent answered the connection.
	ErrUnreachable = errors.New("no agent answers in the guest")
	// ErrProtocol: the agent answered, but not as this protocol says.
	ErrProtocol = errors.New("the guest's agent broke the protocol")
)

// AgentError is a refusal by the agent, its words made printable.
type AgentError struct {
	Status  int
	Code    Code
	Message string
}

func (e *AgentError) Error() string {
	return fmt.Sprintf("the guest's agent refused (%s): %s", e.Code, e.Message)
}

// Dialer opens one connection to an agent.
type Dialer func(ctx context.Context) (net.Conn, error)

// Client calls one guest's agent. It holds no connection between calls and
// may be used by many goroutines.
type Client struct{ dial Dialer }

// NewClient calls the agent that dial reaches.
func NewClient(dial Dialer) *Client { return &Client{dial: dial} }

// NewHybridClient calls the agent of the guest whose hybrid-vsock socket is
// at path.
func NewHybridClient(path string) *Client {
	return NewClient(func(ctx context.Context) (net.Conn, error) { return DialHybrid(ctx, path, Port) })
}

// Health asks the agent what it is.
func (c *Client) Health(ctx context.Context) (Health, error) {
	var h Health
	err := c.call(ctx, http.MethodGet, "/v1/health", nil, &h)
	if err == nil {
		err = protocol(h.check())
	}
	if err != nil {
		return Health{}, err
	}
	return h, nil
}

// Mount asks the agent to mount a device and waits until it has, or until
// the request's timeout; the context should outlast that.
func (c *Client) Mount(ctx context.Context, r MountRequest) (MountReply, error) {
	if err := r.Check(); err != nil {
		return MountReply{}, err
	}
	var reply MountReply
	if err := c.call(ctx, http.MethodPost, "/v1/mounts", r, &reply); err != nil {
		return MountReply{}, err
	}
	if reply.Path != MountPath(r.Label) {
		return MountReply{}, protocol(errors.New("it mounted somewhere else"))
	}
	return reply, nil
}

// Unmount asks the agent to remove a mount, at once and whoever uses it. One
// that is not there is an [*AgentError] with [CodeNotFound].
func (c *Client) Unmount(ctx context.Context, label string) error {
	if err := CheckLabel(label); err != nil {
		return err
	}
	return c.call(ctx, http.MethodDelete, "/v1/mounts/"+url.PathEscape(label), nil, nil)
}

// Mounts lists what the agent says it has mounted.
func (c *Client) Mounts(ctx context.Context) ([]Mount, error) {
	var list MountList
	if err := c.call(ctx, http.MethodGet, "/v1/mounts", nil, &list); err != nil {
		return nil, err
	}
	for _, m := range list.Mounts {
		if err := m.check(); err != nil {
			return nil, protocol(err)
		}
	}
	return list.Mounts, nil
}

// call makes one exchange on a connection of its own. out nil expects 204.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	if _, ok := ctx.Deadline(); !ok {
		return ErrNoDeadline
	}
	request, err := newRequest(method, path, in)
	if err != nil {
		return err
	}
	conn, err := c.dial(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreachable, becauseOf(ctx, err))
	}
	defer conn.Close()
	stop := closeWith(ctx, conn)
	defer stop()

	// A write error is not the end: the agent may have refused early.
	writeErr := request.Write(conn)
	status, body, err := readReply(conn, request)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil && writeErr != nil:
		return fmt.Errorf("%w: %w", ErrUnreachable, writeErr)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return fmt.Errorf("%w: the connection ended early", ErrUnreachable)
	case err != nil:
		return protocol(err)
	}
	return decodeReply(status, body, out)
}

func newRequest(method, path string, in any) (*http.Request, error) {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return nil, err
		}
	}
	request, err := http.NewRequest(method, "http://agent"+path, bytes.NewReader(body)) //nolint:noctx // the deadline is the connection's
	if err != nil {
		return nil, err
	}
	request.Close = true
	request.Header.Set("User-Agent", "spectrum-broker")
	if in != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	return request, nil
}

// readReply reads one answer and no more than [MaxHeader] + [MaxBody] bytes.
func readReply(conn io.Reader, request *http.Request) (status int, body []byte, err error) {
	head := &io.LimitedReader{R: conn, N: MaxHeader}
	r := bufio.NewReader(head)
	reply, err := http.ReadResponse(r, request)
	if err != nil {
		if head.N <= 0 {
			return 0, nil, fmt.Errorf("headers are longer than %d bytes", MaxHeader)
		}
		return 0, nil, err
	}
	defer reply.Body.Close()
	if reply.ContentLength > MaxBody {
		return 0, nil, fmt.Errorf("body is longer than %d bytes", MaxBody)
	}
	// One byte over the bound on both readers tells "too long" from "all".
	head.N = MaxBody + MaxHeader + 1
	body, err = io.ReadAll(io.LimitReader(reply.Body, MaxBody+1))
	if len(body) > MaxBody || head.N <= 0 {
		return 0, nil, fmt.Errorf("body is longer than %d bytes", MaxBody)
	}
	return reply.StatusCode, body, err
}

func decodeReply(status int, body []byte, out any) error {
	switch {
	case status == http.StatusNoContent && out == nil:
		if len(body) != 0 {
			return protocol(errors.New("a body where there is none"))
		}
		return nil
	case status == http.StatusOK && out != nil:
		return protocol(DecodeStrict(body, out))
	case status < 400 || status > 599:
		return protocol(fmt.Errorf("unexpected status %d", status))
	}
	var e ErrorReply
	if err := DecodeStrict(body, &e); err != nil {
		return protocol(fmt.Errorf("status %d: %w", status, err))
	}
	switch e.Code {
	case CodeBadRequest, CodeNotFound, CodeConflict, CodeTimeout, CodeBusy, CodeFailed:
	default:
		return protocol(fmt.Errorf("status %d: unknown code", status))
	}
	return &AgentError{Status: status, Code: e.Code, Message: Printable(e.Message, 200)}
}

// protocol wraps err, nil or not. Words of the guest can be in it (a decoder
// quotes what it met), so it is made printable.
func protocol(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrProtocol, Printable(err.Error(), 200))
}
