package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"

	"github.com/google/uuid"
)

// maxAnswer bounds what a client reads of one answer.
const maxAnswer = 64 << 20

// Client calls the host API. It is safe for concurrent use. Its methods fail
// with an *Error where the broker answered with a problem document, and with
// ErrUnreachable where it did not answer.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client of the broker that listens on socket.
func NewClient(socket string) *Client {
	c := &Client{socket: socket}
	c.http = &http.Client{
		Transport: &http.Transport{
			DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
			DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c
}

// Close gives up idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", c.socket)
}

type idempotencyKey struct{}

// WithIdempotencyKey returns a context whose changing calls carry this key,
// so that a call whose answer was lost can be made again. Without it each
// call has a key of its own. A call whose connection broke before the answer
// was there is made again by itself, once, with the same key.
func WithIdempotencyKey(ctx context.Context, key string) context.Context {
	return context.WithValue(ctx, idempotencyKey{}, key)
}

// newRequest makes a request to path, whose segments are escaped already.
func newRequest(ctx context.Context, method, path string, query url.Values, body any) (*http.Request, error) {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("cannot encode the request: %w", err)
		}
		r = bytes.NewReader(b)
	}
	u := "http://broker" + path
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, r)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", mediaJSON)
	}
	if method != http.MethodGet {
		if key, isSet := ctx.Value(idempotencyKey{}).(string); isSet {
			req.Header.Set("Idempotency-Key", key)
		}
	}
	return req, nil
}

// do sends a request and returns the response of a success.
func (c *Client) do(req *http.Request) (*http.Response, error) {
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(req.Context(), err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, c.unreachable(req.Context(), err)
	}
	return nil, errorOf(resp.StatusCode, b)
}

// unreachable tells the caller's own giving up from a broker that is not
// there.
func (c *Client) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	return fmt.Errorf("%w at %s: %w", ErrUnreachable, c.socket, err)
}

// call sends a request and decodes its answer into T; fields it does not know
// are a newer broker's.
func call[T any](ctx context.Context, c *Client, method, path string, query url.Values, body any) (T, error) {
	if _, isSet := ctx.Value(idempotencyKey{}).(string); !isSet {
		ctx = WithIdempotencyKey(ctx, uuid.NewString())
	}
	out, err := callOnce[T](ctx, c, method, path, query, body)
	if ctx.Err() != nil || !errors.Is(err, ErrUnreachable) || neverConnected(err) {
		return out, err
	}
	// It may have been done, and the answer lost: the broker knows by the key. One
	// that was started since would not, and does not listen that soon.
	again, retryErr := callOnce[T](ctx, c, method, path, query, body)
	if neverConnected(retryErr) {
		return out, err
	}
	return again, retryErr
}

// neverConnected tells that nobody listened, so that nothing was asked.
func neverConnected(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "dial"
}

func callOnce[T any](ctx context.Context, c *Client, method, path string, query url.Values, body any) (T, error) {
	var out T
	req, err := newRequest(ctx, method, path, query, body)
	if err != nil {
		return out, err
	}
	resp, err := c.do(req)
	if err != nil {
		return out, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode == http.StatusNoContent {
		return out, nil
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return out, c.unreachable(ctx, err)
	}
	if err := json.Unmarshal(b, &out); err != nil {
		return out, fmt.Errorf("cannot understand the broker's answer to %s %s: %w", method, path, err)
	}
	return out, nil
}

func seg(s string) string { return url.PathEscape(s) }

// Health asks how the broker is.
func (c *Client) Health(ctx context.Context) (Health, error) {
	return call[Health](ctx, c, http.MethodGet, "/v1/health", nil, nil)
}

// ListVMs lists every VM there is a definition of.
func (c *Client) ListVMs(ctx context.Context) ([]VM, error) {
	l, err := call[VMList](ctx, c, http.MethodGet, "/v1/vms", nil, nil)
	return l.VMs, err
}

// ShowVM shows one VM.
func (c *Client) ShowVM(ctx context.Context, ref string) (VM, error) {
	return call[VM](ctx, c, http.MethodGet, "/v1/vms/"+seg(ref), nil, nil)
}

// StartVM starts a VM and returns when it runs.
func (c *Client) StartVM(ctx context.Context, ref string) (VM, error) {
	return call[VM](ctx, c, http.MethodPost, "/v1/vms/"+seg(ref)+"/start", nil, nil)
}

// StopVM stops a VM and returns when it has.
func (c *Client) StopVM(ctx context.Context, ref string, r StopRequest) (VM, error) {
	return call[VM](ctx, c, http.MethodPost, "/v1/vms/"+seg(ref)+"/stop", nil, r)
}

// Console opens a VM's serial console. ctx bounds the opening only.
func (c *Client) Console(ctx context.Context, ref string) (net.Conn, error) {
	req, err := newRequest(ctx, http.MethodGet, "/v1/vms/"+seg(ref)+"/console", nil, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", ConsoleProtocol)
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	br := bufio.NewReader(conn)
	resp, err := roundTrip(conn, br, req) //nolint:bodyclose // its body is the connection, closed below or by the caller
	if err != nil {
		stop()
		_ = conn.Close()
		return nil, c.unreachable(ctx, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		stop()
		_ = conn.Close()
		return nil, errorOf(resp.StatusCode, b)
	}
	if !stop() {
		_ = conn.Close()
		return nil, ctx.Err()
	}
	return &consoleConn{Conn: conn, r: br}, nil
}

func roundTrip(conn net.Conn, br *bufio.Reader, req *http.Request) (*http.Response, error) {
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	return http.ReadResponse(br, req)
}

// consoleConn first reads what came with the response.
type consoleConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *consoleConn) Read(b []byte) (int, error) { return c.r.Read(b) }

// Grant asks for a grant.
func (c *Client) Grant(ctx context.Context, r GrantRequest) (Grant, error) {
	return call[Grant](ctx, c, http.MethodPost, "/v1/grants", nil, r)
}

// ListGrants lists the grants that f selects, in order of creation.
func (c *Client) ListGrants(ctx context.Context, f GrantFilter) ([]Grant, error) {
	l, err := call[GrantList](ctx, c, http.MethodGet, "/v1/grants", f.values(), nil)
	return l.Grants, err
}

// ShowGrant shows one grant.
func (c *Client) ShowGrant(ctx context.Context, ref string) (Grant, error) {
	return call[Grant](ctx, c, http.MethodGet, "/v1/grants/"+seg(ref), nil, nil)
}

// Why tells how a grant came to be.
func (c *Client) Why(ctx context.Context, ref string) (Why, error) {
	return call[Why](ctx, c, http.MethodGet, "/v1/grants/"+seg(ref)+"/why", nil, nil)
}

// Token fetches the token of a grant.
func (c *Client) Token(ctx context.Context, ref string) (Token, error) {
	return call[Token](ctx, c, http.MethodPost, "/v1/grants/"+seg(ref)+"/token", nil, nil)
}

// Revoke ends grants. With r.Wait, what is still in Revoking afterwards could
// not be cut in time.
func (c *Client) Revoke(ctx context.Context, r RevokeRequest) (RevokeResult, error) {
	return call[RevokeResult](ctx, c, http.MethodPost, "/v1/revocations", nil, r)
}

// Explain says what would become of a request.
func (c *Client) Explain(ctx context.Context, r GrantRequest) (Explanation, error) {
	return call[Explanation](ctx, c, http.MethodPost, "/v1/decisions", nil, r)
}

// ReloadPolicy reads every policy again.
func (c *Client) ReloadPolicy(ctx context.Context) (PolicyStatus, error) {
	return call[PolicyStatus](ctx, c, http.MethodPost, "/v1/policy/reload", nil, nil)
}

// PolicyStatus shows the policy engines.
func (c *Client) PolicyStatus(ctx context.Context) (PolicyStatus, error) {
	return call[PolicyStatus](ctx, c, http.MethodGet, "/v1/policy/status", nil, nil)
}

// ListNames lists the petnames of partitions.
func (c *Client) ListNames(ctx context.Context) ([]Name, error) {
	l, err := call[NameList](ctx, c, http.MethodGet, "/v1/names", nil, nil)
	return l.Names, err
}

// SetName names a partition.
func (c *Client) SetName(ctx context.Context, name string, partition uuid.UUID) (Name, error) {
	return call[Name](ctx, c, http.MethodPut, "/v1/names/"+seg(name), nil, SetNameRequest{Partition: partition})
}

// RemoveName forgets a petname.
func (c *Client) RemoveName(ctx context.Context, name string) error {
	_, err := call[struct{}](ctx, c, http.MethodDelete, "/v1/names/"+seg(name), nil, nil)
	return err
}

// ListPartitions lists the user partitions.
func (c *Client) ListPartitions(ctx context.Context) ([]Partition, error) {
	l, err := call[PartitionList](ctx, c, http.MethodGet, "/v1/partitions", nil, nil)
	return l.Partitions, err
}

// Audit reads one page of the log.
func (c *Client) Audit(ctx context.Context, q EventQuery) (EventList, error) {
	return call[EventList](ctx, c, http.MethodGet, "/v1/audit", q.values(), nil)
}

// VerifyAudit has the broker verify the log's chain.
func (c *Client) VerifyAudit(ctx context.Context, q VerifyQuery) (AuditReport, error) {
	return call[AuditReport](ctx, c, http.MethodGet, "/v1/audit/verify", q.values(), nil)
}

// RotateAudit puts all events of the log into an archive.
func (c *Client) RotateAudit(ctx context.Context) (Rotation, error) {
	return call[Rotation](ctx, c, http.MethodPost, "/v1/audit/rotate", nil, nil)
}

// Events streams events after q.After; with follow it goes on with those that
// come until ctx is done, the broker stops, or the reader is too slow. An
// error is the last thing yielded; resume with After set to the last Seq.
func (c *Client) Events(ctx context.Context, q EventQuery, follow bool) iter.Seq2[Event, error] {
	query := q.values()
	if follow {
		query.Set("follow", "true")
	}
	return c.stream(ctx, query, func() {})
}

// Follow is Events with follow. connected is called when the stream has begun.
func (c *Client) Follow(ctx context.Context, q EventQuery, connected func()) iter.Seq2[Event, error] {
	query := q.values()
	query.Set("follow", "true")
	return c.stream(ctx, query, connected)
}

func (c *Client) stream(ctx context.Context, query url.Values, connected func()) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		req, err := newRequest(ctx, http.MethodGet, "/v1/events", query, nil)
		if err != nil {
			yield(Event{}, err)
			return
		}
		resp, err := c.do(req)
		if err != nil {
			yield(Event{}, err)
			return
		}
		defer func() { _ = resp.Body.Close() }()
		connected()
		for dec := json.NewDecoder(resp.Body); ; {
			var e Event
			switch err := dec.Decode(&e); {
			case errors.Is(err, io.EOF):
				return
			case err != nil:
				yield(Event{}, c.unreachable(ctx, err))
				return
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// Metrics fetches the broker's metrics as Prometheus text.
func (c *Client) Metrics(ctx context.Context) (string, error) {
	req, err := newRequest(ctx, http.MethodGet, "/v1/metrics", nil, nil)
	if err != nil {
		return "", err
	}
	resp, err := c.do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return "", c.unreachable(ctx, err)
	}
	return string(b), nil
}
