package guestcli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"time"

	"spectrum-os.org/broker/agents/wire"
)

// maxAnswer bounds an answer of the broker, in bytes.
const maxAnswer = 1 << 20

// Grant is a capability of this VM, as the broker's guest API tells it.
type Grant struct {
	ID         string          `json:"id"`
	Capability json.RawMessage `json:"capability"`
	Spelling   string          `json:"spelling"`
	Label      string          `json:"label,omitempty"`
	Parent     string          `json:"parent,omitempty"`
	State      string          `json:"state"`
	Created    time.Time       `json:"created"`
	Expires    *time.Time      `json:"expires,omitempty"`
	MountPath  string          `json:"mount_path,omitempty"`
	Narrowed   bool            `json:"narrowed"`
	From       string          `json:"from,omitempty"` // the VM that delegated it
	MaxDepth   *int            `json:"max_depth,omitempty"`
	MaxUses    *int            `json:"max_uses,omitempty"`
	Uses       *int            `json:"uses,omitempty"` // with MaxUses
}

// Self is what this VM may know of itself.
type Self struct {
	ID        string    `json:"id"`
	Partition string    `json:"partition,omitempty"`
	Role      string    `json:"role,omitempty"`
	Instance  string    `json:"instance,omitempty"`
	Now       time.Time `json:"now"`
}

// Request asks for a capability.
type Request struct {
	Capability string `json:"capability"`
	TTLSeconds *int64 `json:"ttl_seconds,omitempty"`
	Label      string `json:"label,omitempty"`
	Parent     string `json:"parent,omitempty"`
}

// Granted answers a [Request].
type Granted struct {
	Grant Grant  `json:"grant"`
	Token string `json:"token"`
}

// Problem is the broker's refusal, an RFC 9457 document.
type Problem struct {
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
	Code   string `json:"code"`
}

func (p *Problem) Error() string {
	if p.Detail == "" {
		return p.Title
	}
	return p.Title + ": " + p.Detail
}

// ErrUnreachable says that no broker answers this VM.
var ErrUnreachable = errors.New("the broker does not answer")

// Client asks the broker. Each call has a connection of its own.
type Client struct{ http http.Client }

// NewClient reaches the broker with dial.
func NewClient(dial wire.Dialer) *Client {
	return &Client{http: http.Client{
		Transport: &http.Transport{
			DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
			DisableKeepAlives:      true,
			MaxResponseHeaderBytes: wire.MaxHeader,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Self asks who this VM is.
func (c *Client) Self(ctx context.Context) (s Self, err error) {
	return s, c.call(ctx, http.MethodGet, "/v1/self", nil, &s)
}

// List lists this VM's capabilities.
func (c *Client) List(ctx context.Context) ([]Grant, error) {
	var list struct {
		Capabilities []Grant `json:"capabilities"`
	}
	return list.Capabilities, c.call(ctx, http.MethodGet, "/v1/capabilities", nil, &list)
}

// Request asks for a capability.
func (c *Client) Request(ctx context.Context, r Request) (g Granted, err error) {
	return g, c.call(ctx, http.MethodPost, "/v1/requests", r, &g)
}

// Delegation passes a grant of this VM on to another one.
type Delegation struct {
	Grant      string `json:"grant,omitempty"` // its id
	Token      string `json:"token,omitempty"` // or its token
	To         string `json:"to"`
	Capability string `json:"capability,omitempty"`
	TTLSeconds *int64 `json:"ttl_seconds,omitempty"`
	MaxUses    *int   `json:"max_uses,omitempty"`
	MaxDepth   *int   `json:"max_depth,omitempty"`
	Label      string `json:"label,omitempty"`
}

// Delegate passes a grant on.
func (c *Client) Delegate(ctx context.Context, d Delegation) (g Grant, err error) {
	return g, c.call(ctx, http.MethodPost, "/v1/delegations", d, &g)
}

// Token fetches the token of the grant called id.
func (c *Client) Token(ctx context.Context, id string) (token string, err error) {
	var out struct {
		Token string `json:"token"`
	}
	err = c.call(ctx, http.MethodPost, "/v1/capabilities/"+id+"/token", nil, &out)
	return out.Token, err
}

// Drop gives up the grant called id.
func (c *Client) Drop(ctx context.Context, id string) (g Grant, err error) {
	return g, c.call(ctx, http.MethodDelete, "/v1/capabilities/"+id, nil, &g)
}

// DropToken gives up the grant that token is of.
func (c *Client) DropToken(ctx context.Context, token string) (g Grant, err error) {
	body := struct {
		Token string `json:"token"`
	}{token}
	return g, c.call(ctx, http.MethodPost, "/v1/capabilities/drop", body, &g)
}

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://broker"+path, body)
	if err != nil {
		return err
	}
	if in != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	reply, err := c.http.Do(request)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	defer reply.Body.Close()
	b, err := io.ReadAll(io.LimitReader(reply.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return decodeAnswer(reply.StatusCode, reply.Header.Get("Content-Type"), b, out)
}

// decodeAnswer takes fields it does not know: a guest's agent may be older
// than the broker.
func decodeAnswer(status int, contentType string, body []byte, out any) error {
	if len(body) > maxAnswer {
		return fmt.Errorf("the broker's answer is longer than %d bytes", maxAnswer)
	}
	if status >= 200 && status < 300 {
		if err := json.Unmarshal(body, out); err != nil {
			return fmt.Errorf("the broker's answer is not to be understood: %w", err)
		}
		return nil
	}
	kind, _, _ := mime.ParseMediaType(contentType)
	p := &Problem{}
	if kind != "application/problem+json" || json.Unmarshal(body, p) != nil || p.Code == "" {
		return fmt.Errorf("the broker answered with status %d", status)
	}
	p.Title, p.Detail = wire.Printable(p.Title, 200), wire.Printable(p.Detail, 1000)
	return p
}
