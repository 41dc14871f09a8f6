package api_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/api/apitest"
)

// logBuffer is a log that tests may read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// socketDir is short, because a socket's path must be.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

type host struct {
	*fake
	handler *api.HostHandler
	client  *api.Client
	valid   *apitest.Validator
	socket  string
	log     *logBuffer
	stop    func()
}

// serveHost runs a server over a fake on a real socket, with everything that
// passes held against the document.
func serveHost(t *testing.T, o api.HostOptions) *host {
	t.Helper()
	h := &host{fake: newFake(), log: &logBuffer{}, valid: apitest.New(t, api.HostDocument)}
	o.Log = slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	h.handler = api.NewHostHandler(h.fake, o)
	h.socket = filepath.Join(socketDir(t), "s")
	l, err := api.ListenHost(h.socket, 0o600, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- api.ServeHost(ctx, l, h.valid.Wrap(h.handler), api.ServeOptions{Log: o.Log, Grace: time.Second})
	}()
	h.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the server ended with %v", err)
		}
	})
	t.Cleanup(h.stop)
	h.client = api.NewClient(h.socket)
	t.Cleanup(h.client.Close)
	return h
}

func wantCode(t *testing.T, err error, code api.Code, words ...string) {
	t.Helper()
	_ = coded(t, err, code, words...)
}

func coded(t *testing.T, err error, code api.Code, words ...string) *api.Error {
	t.Helper()
	var e *api.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("got error %v, want code %s", err, code)
	}
	for _, w := range words {
		if !strings.Contains(e.Detail, w) {
			t.Errorf("the detail %q does not say %q", e.Detail, w)
		}
	}
	return e
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestClientAndServer(t *testing.T) {
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		_, _ = io.WriteString(w, "up 1\n")
	})
	h := serveHost(t, api.HostOptions{Metrics: metrics})
	ctx, c := t.Context(), h.client

	if got := must[api.Health](t)(c.Health(ctx)); !got.Ready || got.Version != "test" {
		t.Errorf("health is %+v", got)
	}
	if got := must[string](t)(c.Metrics(ctx)); got != "up 1\n" {
		t.Errorf("metrics are %q", got)
	}
	if got := must[[]api.VM](t)(c.ListVMs(ctx)); !reflect.DeepEqual(got, h.vms) {
		t.Errorf("the VMs are %+v", got)
	}
	if got := must[api.VM](t)(c.StartVM(ctx, "work/mail")); got.ID != mailVM || got.State != api.VMRunning {
		t.Errorf("started %+v", got)
	}
	if got := must[api.VM](t)(c.ShowVM(ctx, "work/mail")); got.ID != mailVM {
		t.Errorf("showed %+v", got)
	}
	for _, ref := range []string{"%2F", "a/../b", "a?b#c", "ä ö", ".", "..", "%"} {
		_, err := c.ShowVM(ctx, ref)
		wantCode(t, err, api.CodeNotFound)
		if got := h.refs[len(h.refs)-1]; got != ref {
			t.Errorf("the reference %q arrived as %q", ref, got)
		}
	}
	_, err := c.ShowVM(ctx, "mail")
	if e := coded(t, err, api.CodeAmbiguous); !reflect.DeepEqual(e.Candidates, []string{"work/mail", "home/mail"}) {
		t.Errorf("the candidates are %v", e.Candidates)
	}
	if _, err := c.ShowVM(ctx, "nobody"); !errors.Is(err, &api.Error{Code: api.CodeNotFound}) {
		t.Errorf("errors.Is does not find the code in %v", err)
	}

	ttl := int64(60)
	g := must[api.Grant](t)(c.Grant(ctx, api.GrantRequest{VM: "work/mail", Capability: "fs:ro:work:/docs", TTLSeconds: &ttl, Label: "docs", Wait: true, TimeoutSeconds: 1.5}))
	if g.State != api.GrantActive || g.Label != "docs" {
		t.Errorf("granted %+v", g)
	}
	_, err = c.Grant(ctx, api.GrantRequest{VM: "work/mail", Capability: "fs:ro:work:/secret"})
	if e := coded(t, err, api.CodeDenied, "no secrets"); e.Verdict == nil || e.Verdict.Answers[0].Reasons[0].Line != 7 {
		t.Errorf("the verdict is %+v", e.Verdict)
	}
	if got := must[[]api.Grant](t)(c.ListGrants(ctx, api.GrantFilter{VM: "work/mail", State: []api.GrantState{api.GrantActive, api.GrantRevoking}})); len(got) != 1 || got[0].ID != g.ID {
		t.Errorf("listed %+v", got)
	}
	if got := must[[]api.Grant](t)(c.ListGrants(ctx, api.GrantFilter{VM: "nobody"})); got == nil || len(got) != 0 {
		t.Errorf("listed %#v, want an empty list", got)
	}
	if got := must[api.Grant](t)(c.ShowGrant(ctx, g.ID.String()[:8])); got.ID != g.ID {
		t.Errorf("showed %+v", got)
	}
	if got := must[api.Token](t)(c.Token(ctx, g.ID.String())); got.Grant != g.ID || got.Token == "" {
		t.Errorf("the token is for %v", got.Grant)
	}
	if got := must[api.Explanation](t)(c.Explain(ctx, api.GrantRequest{VM: "work/mail", Capability: "fs:ro:work:/x"})); got.Verdict.Outcome != api.OutcomeAllow || got.Actions[0] != "attach" {
		t.Errorf("explained %+v", got)
	}
	h.mu.Lock()
	h.cut = false
	h.mu.Unlock()
	if got := must[api.RevokeResult](t)(c.Revoke(ctx, api.RevokeRequest{IDs: []string{g.ID.String()}})); len(got.Revoking) != 1 || len(got.Revoked) != 0 {
		t.Errorf("revoked %+v", got)
	}
	h.mu.Lock()
	h.cut = true
	h.mu.Unlock()
	if got := must[api.RevokeResult](t)(c.Revoke(ctx, api.RevokeRequest{All: true, Reason: "enough", Wait: true})); len(got.Revoked) != 1 || got.Revoking == nil {
		t.Errorf("revoked %+v", got)
	}
	if h.last.Reason != "enough" || !h.last.Wait {
		t.Errorf("the request arrived as %+v", h.last)
	}
	if got := must[[]api.Grant](t)(c.ListGrants(ctx, api.GrantFilter{All: true})); len(got) != 1 || got[0].State != api.GrantRevoked {
		t.Errorf("listed %+v", got)
	}

	if got := must[api.PolicyStatus](t)(c.ReloadPolicy(ctx)); got.Engines[0].Revision != "r1" {
		t.Errorf("reloaded %+v", got)
	}
	if got := must[api.PolicyStatus](t)(c.PolicyStatus(ctx)); got.Engines == nil {
		t.Errorf("status %+v", got)
	}
	if got := must[api.Name](t)(c.SetName(ctx, "home", partition)); got.Name != "home" {
		t.Errorf("set %+v", got)
	}
	if got := must[[]api.Name](t)(c.ListNames(ctx)); len(got) != 2 {
		t.Errorf("names %+v", got)
	}
	if err := c.RemoveName(ctx, "home"); err != nil {
		t.Error(err)
	}
	wantCode(t, c.RemoveName(ctx, "home"), api.CodeNotFound)
	_, err = c.SetName(ctx, "Not A Name", partition)
	wantCode(t, err, api.CodeInvalid, "label")
	if got := must[[]api.Partition](t)(c.ListPartitions(ctx)); len(got) != 1 {
		t.Errorf("partitions %+v", got)
	}
	if got := must[api.AuditReport](t)(c.VerifyAudit(ctx, api.VerifyQuery{})); got.Broken == nil || got.Broken.Seq != 3 {
		t.Errorf("verified %+v", got)
	}
	grace := 0.5
	if got := must[api.VM](t)(c.StopVM(ctx, "work/mail", api.StopRequest{GraceSeconds: &grace})); got.State != api.VMStopped {
		t.Errorf("stopped %+v", got)
	}

	// Who called is who we are.
	for _, by := range h.by {
		if by != (api.Caller{}) && by != (api.Caller{Kind: api.CallerPerson, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), PID: int32(os.Getpid())}) {
			t.Errorf("a call was made by %+v", by)
		}
	}
}

func TestUnreachable(t *testing.T) {
	path := filepath.Join(socketDir(t), "nobody")
	c := api.NewClient(path)
	_, err := c.Health(t.Context())
	if !errors.Is(err, api.ErrUnreachable) || !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
	if _, err := c.Console(t.Context(), "x"); !errors.Is(err, api.ErrUnreachable) {
		t.Errorf("got %v", err)
	}
	for _, err := range c.Events(t.Context(), api.EventQuery{}, true) {
		if !errors.Is(err, api.ErrUnreachable) {
			t.Errorf("got %v", err)
		}
	}
	// A broker that goes in the middle of an answer.
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 512))
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
			_ = conn.Close()
		}
	}()
	if _, err := c.ListVMs(t.Context()); !errors.Is(err, api.ErrUnreachable) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	<-ctx.Done()
	if _, err := c.ListVMs(ctx); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, api.ErrUnreachable) {
		t.Errorf("got %v, want the caller's own deadline", err)
	}
}

func TestNobodyWithoutCredentials(t *testing.T) {
	f := newFake()
	h := api.NewHostHandler(f, api.HostOptions{})
	for _, r := range h.Rows() {
		req, _ := http.NewRequestWithContext(t.Context(), r.Method, "http://broker"+strings.NewReplacer("{ref}", "x", "{name}", "x").Replace(r.Path), strings.NewReader("{}"))
		req.Header.Set("Content-Type", "application/json")
		rec := &memory{h: http.Header{}}
		h.ServeHTTP(rec, req)
		if refused := rec.status == http.StatusForbidden; refused == (r.Rule == api.RuleAnyone) {
			t.Errorf("%s %s answers %d to nobody: %s", r.Method, r.Path, rec.status, rec.body.String())
		}
	}
	if len(f.calls) != 0 {
		t.Errorf("the service was called: %v", f.calls)
	}
}

type memory struct {
	h      http.Header
	status int
	body   bytes.Buffer
}

func (m *memory) Header() http.Header         { return m.h }
func (m *memory) WriteHeader(s int)           { m.status = s }
func (m *memory) Write(b []byte) (int, error) { return m.body.Write(b) }

// do sends a raw request over the host's socket.
func (h *host) do(t *testing.T, method, path, body string, header ...string) (int, http.Header, string) {
	t.Helper()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", h.socket)
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://broker"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, string(b)
}

func TestRefusedRequests(t *testing.T) {
	h := serveHost(t, api.HostOptions{MaxBody: 4096})
	const grant = `{"vm":"work/mail","capability":"fs:ro:work:/a"}`
	for _, c := range []struct {
		name, method, path, body string
		header                   []string
		status                   int
		say                      string
	}{
		{"no route", "GET", "/v1/nothing", "", nil, 404, "no such route"},
		{"no version", "GET", "/vms", "", nil, 404, "no such route"},
		{"trailing slash", "GET", "/v1/vms/", "", nil, 404, "no such route"},
		{"double slash", "GET", "/v1//vms", "", nil, 404, "no such route"},
		{"bad escape kept", "GET", "/v1/vms/a/b", "", nil, 404, "no such route"},
		{"wrong method", "PATCH", "/v1/grants", "", nil, 405, "use GET, POST"},
		{"HEAD", "HEAD", "/v1/vms", "", nil, 405, ""},
		{"unknown parameter", "GET", "/v1/vms?x=1", "", nil, 400, `unknown query parameter`},
		{"bad query", "GET", "/v1/grants?vm=%zz", "", nil, 400, "query is malformed"},
		{"twice", "GET", "/v1/grants?vm=a&vm=b", "", nil, 400, "more than once"},
		{"bad state", "GET", "/v1/grants?state=x", "", nil, 400, "no state of a grant"},
		{"bad flag", "GET", "/v1/grants?all=1", "", nil, 400, "true or false"},
		{"bad cursor", "GET", "/v1/events?after=-1", "", nil, 400, "not a number"},
		{"bad limit", "GET", "/v1/events?limit=10001", "", nil, 400, "not a number"},
		{"bad time", "GET", "/v1/audit?since=yesterday", "", nil, 400, "RFC 3339"},
		{"limit and follow", "GET", "/v1/events?limit=1&follow=true", "", nil, 400, "exclude"},
		{"body on GET", "GET", "/v1/vms", "{}", nil, 400, "takes no body"},
		{"no body", "POST", "/v1/grants", "", nil, 400, "body is missing"},
		{"media type", "POST", "/v1/grants", grant, []string{"Content-Type", "text/plain"}, 415, "application/json"},
		{"too large", "POST", "/v1/grants", grant + strings.Repeat(" ", 4096), nil, 413, "over 4096 bytes"},
		{"control character", "GET", "/v1/vms/a%0ab", "", nil, 400, "control character"},
		{"long reference", "GET", "/v1/vms/" + strings.Repeat("a", 513), "", nil, 400, "longer than 512"},
		{"console without upgrade", "GET", "/v1/vms/mail/console", "", nil, 400, "Upgrade: spectrum-console"},
		{"key", "POST", "/v1/grants", grant, []string{"Idempotency-Key", "a b"}, 400, "visible ASCII"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, header, body := h.do(t, c.method, c.path, c.body, c.header...)
			if status != c.status || !strings.Contains(body, c.say) {
				t.Errorf("got %d %s, want %d saying %q", status, body, c.status, c.say)
			}
			if header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("the media type is %s", header.Get("Content-Type"))
			}
			if c.status == 405 && header.Get("Allow") == "" {
				t.Error("there is no Allow")
			}
		})
	}
	if len(h.calls) != 0 {
		t.Errorf("the service was called: %v", h.calls)
	}
	status, header, body := h.do(t, "POST", "/v1/grants", grant)
	if status != 201 || !strings.HasPrefix(header.Get("Location"), "/v1/grants/") || header.Get("Cache-Control") != "no-store" {
		t.Errorf("got %d %v %s", status, header, body)
	}
}

func TestIdempotency(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	const a, b = `{"vm":"work/mail","capability":"fs:ro:work:/a"}`, `{"vm":"work/mail","capability":"fs:ro:work:/b"}`
	s1, _, first := h.do(t, "POST", "/v1/grants", a, "Idempotency-Key", "k1")
	s2, head, again := h.do(t, "POST", "/v1/grants", a, "Idempotency-Key", "k1")
	if s1 != 201 || s2 != 201 || first != again || head.Get("Idempotency-Replayed") != "true" || h.count("Grant") != 1 {
		t.Errorf("got %d %s then %d %s after %d calls", s1, first, s2, again, h.count("Grant"))
	}
	if s, _, body := h.do(t, "POST", "/v1/grants", b, "Idempotency-Key", "k1"); s != 422 || !strings.Contains(body, `"key_reused"`) {
		t.Errorf("another body got %d %s", s, body)
	}
	if s, _, _ := h.do(t, "POST", "/v1/decisions", a, "Idempotency-Key", "k1"); s != 422 {
		t.Errorf("another route got %d", s)
	}
	if s, _, body := h.do(t, "POST", "/v1/grants", b, "Idempotency-Key", "k2"); s != 201 || body == first {
		t.Errorf("another key got %d %s", s, body)
	}
	// A refusal is an answer too.
	denied := `{"vm":"work/mail","capability":"fs:ro:work:/secret"}`
	h.do(t, "POST", "/v1/grants", denied, "Idempotency-Key", "k3")
	calls := h.count("Grant")
	if s, _, _ := h.do(t, "POST", "/v1/grants", denied, "Idempotency-Key", "k3"); s != 403 || h.count("Grant") != calls {
		t.Errorf("the refusal was asked again: %d", s)
	}
	// What was not done may be tried again.
	h.mu.Lock()
	h.fail = &api.Error{Code: api.CodeUnavailable, Detail: "starting", RetryAfter: 2}
	h.mu.Unlock()
	if s, head, _ := h.do(t, "POST", "/v1/grants", a, "Idempotency-Key", "k4"); s != 503 || head.Get("Retry-After") != "2" {
		t.Errorf("got %d %v", s, head)
	}
	h.mu.Lock()
	h.fail = nil
	h.mu.Unlock()
	if s, _, _ := h.do(t, "POST", "/v1/grants", a, "Idempotency-Key", "k4"); s != 201 {
		t.Errorf("got %d", s)
	}
	// The client's own keys are new each time, unless it says otherwise.
	ctx := api.WithIdempotencyKey(t.Context(), "mine")
	g1 := must[api.Grant](t)(h.client.Grant(ctx, api.GrantRequest{VM: "work/mail", Capability: "fs:ro:work:/c"}))
	g2 := must[api.Grant](t)(h.client.Grant(ctx, api.GrantRequest{VM: "work/mail", Capability: "fs:ro:work:/c"}))
	g3 := must[api.Grant](t)(h.client.Grant(t.Context(), api.GrantRequest{VM: "work/mail", Capability: "fs:ro:work:/c"}))
	if g1.ID != g2.ID || g1.ID == g3.ID {
		t.Errorf("got %s, %s, %s", g1.ID, g2.ID, g3.ID)
	}
}

// A client that goes away in the middle finds its answer when it comes back,
// and those that ask meanwhile wait for the same one.
func TestIdempotencyAcrossLostConnections(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	entered, release := make(chan struct{}), make(chan struct{})
	var ended atomic.Bool
	h.delay = func(ctx context.Context) {
		close(entered)
		<-release
		ended.Store(ctx.Err() != nil)
	}
	req := api.GrantRequest{VM: "work/mail", Capability: "fs:ro:work:/a"}
	ctx, cancel := context.WithCancel(api.WithIdempotencyKey(t.Context(), "k"))
	lost := make(chan error, 1)
	go func() { _, err := h.client.Grant(ctx, req); lost <- err }()
	<-entered
	cancel()
	if err := <-lost; !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	got := make(chan api.Grant, 8)
	for range cap(got) {
		go func() {
			g, err := h.client.Grant(api.WithIdempotencyKey(t.Context(), "k"), req)
			if err != nil {
				t.Error(err)
			}
			got <- g
		}()
	}
	time.Sleep(50 * time.Millisecond)
	close(release)
	first := <-got
	for range cap(got) - 1 {
		if g := <-got; g.ID != first.ID || g.ID == uuid.Nil {
			t.Errorf("got %s and %s", first.ID, g.ID)
		}
	}
	if ended.Load() || h.count("Grant") != 1 {
		t.Errorf("ended by the client's going: %v; %d calls", ended.Load(), h.count("Grant"))
	}
}

func TestIdempotencyIsBounded(t *testing.T) {
	h := serveHost(t, api.HostOptions{KeyTTL: 40 * time.Millisecond})
	h.handler.Bound(2)
	const a = `{"vm":"work/mail","capability":"fs:ro:work:/a"}`
	for _, k := range []string{"1", "2", "3", "1"} { // 1 is forgotten for 3
		if s, head, _ := h.do(t, "POST", "/v1/grants", a, "Idempotency-Key", k); s != 201 || head.Get("Idempotency-Replayed") != "" {
			t.Errorf("key %s got %d %v", k, s, head)
		}
	}
	time.Sleep(60 * time.Millisecond)
	if s, head, _ := h.do(t, "POST", "/v1/grants", a, "Idempotency-Key", "1"); s != 201 || head.Get("Idempotency-Replayed") != "" {
		t.Errorf("after its time the key got %d %v", s, head)
	}
	// With all places taken by requests under way, the next is refused.
	entered, release := make(chan struct{}, 2), make(chan struct{})
	h.mu.Lock()
	h.delay = func(context.Context) { entered <- struct{}{}; <-release }
	h.mu.Unlock()
	var wg sync.WaitGroup
	for _, k := range []string{"x", "y"} {
		wg.Go(func() { h.do(t, "POST", "/v1/grants", a, "Idempotency-Key", k) })
	}
	<-entered
	<-entered
	if s, _, body := h.do(t, "POST", "/v1/grants", a, "Idempotency-Key", "z"); s != 503 || !strings.Contains(body, "under way") {
		t.Errorf("got %d %s", s, body)
	}
	close(release)
	wg.Wait()
}

func TestProblems(t *testing.T) {
	cause := errors.New("cause")
	p := api.HostProblem(api.Errorf(api.CodeConflict, "cannot %s", "do").WithCause(cause))
	if p.Status != 409 || p.Detail != "cannot do" || p.Type != "urn:spectrum-broker:problem:conflict" || p.Title == "" || p.Instance != "" {
		t.Errorf("got %+v", p)
	}
	for _, c := range []struct {
		err  error
		code api.Code
	}{
		{context.DeadlineExceeded, api.CodeTimeout},
		{context.Canceled, api.CodeUnavailable},
		{errors.New("x"), api.CodeInternal},
		{&api.Error{Code: "made up", Detail: "secret"}, api.CodeInternal},
		{errors.Join(errors.New("x"), api.Errorf(api.CodeNoSlots, "full")), api.CodeNoSlots},
	} {
		if got := api.HostProblem(c.err); got.Code != c.code || got.Status != c.code.Status() || strings.Contains(got.Detail, "secret") {
			t.Errorf("%v becomes %+v", c.err, got)
		}
	}
	e := api.Errorf(api.CodeDenied, "x").WithCause(cause)
	if !errors.Is(e, cause) || !errors.Is(e, &api.Error{Code: api.CodeDenied}) || errors.Is(e, &api.Error{Code: api.CodeInvalid}) {
		t.Error("errors.Is is wrong")
	}
}
