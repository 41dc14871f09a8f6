package api_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/api/apitest"
)

type guest struct {
	guestFake
	vm     uuid.UUID
	socket string
	log    *logBuffer
	stop   func()
}

// serveGuest runs one VM's server over f on a real socket. The validator sits
// inside, so that ServeGuest's own bounds are tested too.
func serveGuest(t *testing.T, f *fake, vm uuid.UUID, o api.GuestOptions) *guest {
	t.Helper()
	g := &guest{guestFake: guestFake{f}, vm: vm, log: &logBuffer{}}
	o.Log = slog.New(slog.NewTextHandler(g.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	g.socket = filepath.Join(socketDir(t), "vsock.sock_219")
	l, err := api.ListenGuest(g.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	h := api.NewGuestHandler(g.guestFake, vm, o)
	go func() { done <- api.ServeGuest(ctx, l, h, api.ServeOptions{Log: o.Log, Grace: time.Second}) }()
	g.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the server ended with %v", err)
		}
	})
	t.Cleanup(g.stop)
	return g
}

func (g *guest) dial(t *testing.T) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

// do makes one request and holds it and its answer against the document.
func (g *guest) do(t *testing.T, method, path, body string, header ...string) (int, string) {
	t.Helper()
	v := apitest.New(t, api.GuestDocument)
	tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", g.socket) }}
	defer tr.CloseIdleConnections()
	req, _ := http.NewRequestWithContext(t.Context(), method, "http://broker"+path, strings.NewReader(body))
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
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.CheckResponse(req, resp.StatusCode, resp.Header, b); err != nil {
		t.Errorf("%s %s: %v\n%s", method, path, err, b)
	}
	if resp.StatusCode < 300 {
		if err := v.CheckRequest(req, []byte(body)); err != nil {
			t.Errorf("%s %s: %v\n%s", method, path, err, body)
		}
	}
	return resp.StatusCode, string(b)
}

func (g *guest) granted(t *testing.T, capability string) api.GuestGranted {
	t.Helper()
	status, body := g.do(t, "POST", "/v1/requests", `{"capability":"`+capability+`","label":"l","ttl_seconds":60}`)
	var out api.GuestGranted
	if err := json.Unmarshal([]byte(body), &out); status != 201 || err != nil {
		t.Fatalf("got %d %s", status, body)
	}
	return out
}

func TestGuestOwnsItsGrants(t *testing.T) {
	f := newFake()
	mine, other := serveGuest(t, f, mailVM, api.GuestOptions{Rate: 1e6, Burst: 1e6}), serveGuest(t, f, otherVM, api.GuestOptions{Rate: 1e6, Burst: 1e6})
	if s, body := mine.do(t, "GET", "/v1/self", ""); s != 200 || !strings.Contains(body, mailVM.String()) {
		t.Errorf("got %d %s", s, body)
	}
	g := mine.granted(t, "fs:ro:self:/docs")
	if g.Token == "" || g.Grant.State != api.GrantActive {
		t.Errorf("granted %+v", g)
	}
	if s, body := mine.do(t, "GET", "/v1/capabilities", ""); s != 200 || !strings.Contains(body, g.Grant.ID.String()) || strings.Contains(body, g.Token) {
		t.Errorf("got %d %s", s, body)
	}
	if s, body := other.do(t, "GET", "/v1/capabilities", ""); s != 200 || body != `{"capabilities":[]}`+"\n" {
		t.Errorf("the other VM sees %d %s", s, body)
	}
	derive := `{"capability":"fs:ro:self:/docs/a","parent":"` + g.Token + `"}`
	if s, body := mine.do(t, "POST", "/v1/requests", derive); s != 201 {
		t.Errorf("deriving got %d %s", s, body)
	}
	// Another VM's token is refused in the words of a forged one.
	s1, stolen := other.do(t, "POST", "/v1/requests", derive)
	s2, forged := other.do(t, "POST", "/v1/requests", `{"capability":"fs:ro:self:/docs/a","parent":"Zm9yZ2Vk"}`)
	if s1 != 403 || s2 != 403 || stolen != forged || !strings.Contains(stolen, `"token_refused"`) {
		t.Errorf("got %d %s and %d %s", s1, stolen, s2, forged)
	}
	s1, stolen = other.do(t, "POST", "/v1/capabilities/drop", `{"token":"`+g.Token+`"}`)
	s2, forged = other.do(t, "POST", "/v1/capabilities/drop", `{"token":"Zm9yZ2Vk"}`)
	if s1 != 403 || s2 != 403 || stolen != forged {
		t.Errorf("got %d %s and %d %s", s1, stolen, s2, forged)
	}
	// A grant of another's is not there, like one that is not there.
	s1, theirs := other.do(t, "DELETE", "/v1/capabilities/"+g.Grant.ID.String(), "")
	s2, none := other.do(t, "DELETE", "/v1/capabilities/"+uuid.NewString(), "")
	s3, bad := other.do(t, "DELETE", "/v1/capabilities/everything", "")
	if s1 != 404 || s2 != 404 || s3 != 404 || theirs != none || none != bad {
		t.Errorf("got %d %s, %d %s and %d %s", s1, theirs, s2, none, s3, bad)
	}
	if f.grants[0].State != api.GrantActive {
		t.Fatal("the other VM ended it")
	}
	if s, body := mine.do(t, "DELETE", "/v1/capabilities/"+g.Grant.ID.String(), `{"token":"`+g.Token+`"}`); s != 200 || !strings.Contains(body, `"revoked"`) {
		t.Errorf("got %d %s", s, body)
	}
	again := mine.granted(t, "fs:ro:self:/docs")
	f.mu.Lock()
	f.cut = false
	f.mu.Unlock()
	if s, body := mine.do(t, "POST", "/v1/capabilities/drop", `{"token":"`+again.Token+`"}`); s != 202 || !strings.Contains(body, `"revoking"`) {
		t.Errorf("got %d %s", s, body)
	}
	for _, log := range []string{mine.log.String(), other.log.String()} {
		if strings.Contains(log, g.Token) || strings.Contains(log, again.Token) {
			t.Error("a log holds a token")
		}
	}
	if !strings.Contains(other.log.String(), "wrong holder") {
		t.Error("the log lacks the cause")
	}
}

// Whatever a guest may not know is answered in the same bytes.
func TestGuestLearnsNothing(t *testing.T) {
	f := newFake()
	f.names["private"] = otherVM
	g := serveGuest(t, f, mailVM, api.GuestOptions{Rate: 1e6, Burst: 1e6})
	ask := func(capability string) string {
		t.Helper()
		s, body := g.do(t, "POST", "/v1/requests", `{"capability":"`+capability+`"}`)
		if s != 403 {
			t.Errorf("%s got %d %s", capability, s, body)
		}
		return body
	}
	byPolicy := ask("fs:ro:self:/secret")
	for _, c := range []string{"fs:ro:private:/a", "fs:ro:nobody:/a", "fs:ro:" + otherVM.String() + ":/a"} {
		if got := ask(c); got != byPolicy {
			t.Errorf("%s is told from a refusal by policy: %s", c, got)
		}
	}
	for _, word := range []string{"host.rego", "verdict", "private", otherVM.String(), "secrets"} {
		if strings.Contains(byPolicy, word) {
			t.Errorf("the refusal says %q: %s", word, byPolicy)
		}
	}
	for _, code := range api.Codes() {
		e := &api.Error{Code: code, Detail: "SECRET", Candidates: []string{"SECRET"}, Verdict: &api.Verdict{Summary: "SECRET"}, Grant: &api.Grant{Reason: "SECRET"}}
		p := api.GuestProblem(e.WithCause(errors.New("SECRET")), api.CodeDenied)
		b, _ := json.Marshal(p)
		if code != api.CodeInvalid && strings.Contains(string(b), "SECRET") {
			t.Errorf("%s tells %s", code, b)
		}
		if p.Detail == "" {
			t.Errorf("%s tells nothing at all", code)
		}
	}
	if p := api.GuestProblem(errors.New("SECRET"), api.CodeDenied); p.Code != api.CodeInternal || strings.Contains(fmt.Sprint(p), "SECRET") {
		t.Errorf("got %+v", p)
	}
}

func TestGuestRefusals(t *testing.T) {
	g := serveGuest(t, newFake(), mailVM, api.GuestOptions{Rate: 1e6, Burst: 1e6})
	const fs = `"capability":"fs:ro:self:/a"`
	for _, c := range []struct {
		name, method, path, body string
		status                   int
		say                      string
	}{
		{"host's routes", "GET", "/v1/vms", "", 404, "not_found"},
		{"host's grants", "POST", "/v1/grants", `{"vm":"x",` + fs + `}`, 404, "not_found"},
		{"events", "GET", "/v1/events", "", 404, "not_found"},
		{"method", "POST", "/v1/self", "{}", 405, "method_not_allowed"},
		{"query", "GET", "/v1/self?vm=x", "", 400, "unknown query parameter"},
		{"holder", "POST", "/v1/requests", `{"vm":"x",` + fs + `}`, 400, `unknown field \"vm\"`},
		{"case", "POST", "/v1/requests", `{"Capability":"fs:ro:self:/a"}`, 400, `unknown field \"Capability\"`},
		{"twice", "POST", "/v1/requests", `{` + fs + `,` + fs + `}`, 400, "given twice"},
		{"null", "POST", "/v1/requests", `{"capability":null}`, 400, "null"},
		{"array", "POST", "/v1/requests", `[]`, 400, "not a JSON object"},
		{"two values", "POST", "/v1/requests", `{` + fs + `}{}`, 400, "more than one value"},
		{"truncated", "POST", "/v1/requests", `{` + fs, 400, "not complete JSON"},
		{"not UTF-8", "POST", "/v1/requests", "{\"capability\":\"fs:\xff\"}", 400, "not UTF-8"},
		{"half a surrogate", "POST", "/v1/requests", `{"capability":"fs:\ud800"}`, 400, "not Unicode"},
		{"type", "POST", "/v1/requests", `{"capability":7}`, 400, "refused"},
		{"fraction", "POST", "/v1/requests", `{` + fs + `,"ttl_seconds":1.5}`, 400, "refused"},
		{"overflow", "POST", "/v1/requests", `{` + fs + `,"ttl_seconds":1e400}`, 400, "refused"},
		{"negative", "POST", "/v1/requests", `{` + fs + `,"ttl_seconds":-1}`, 400, "ttl_seconds"},
		{"label", "POST", "/v1/requests", `{` + fs + `,"label":"../x"}`, 400, "label"},
		{"token", "POST", "/v1/requests", `{` + fs + `,"parent":"a+b="}`, 400, "base64url"},
		{"long", "POST", "/v1/requests", `{"capability":"` + strings.Repeat("a", 8193) + `"}`, 400, "longer than"},
		{"deep", "POST", "/v1/requests", strings.Repeat("[", 10000) + strings.Repeat("]", 10000), 400, "not a JSON object"},
		{"deep inside", "POST", "/v1/requests", `{"capability":` + strings.Repeat("[", 10000) + strings.Repeat("]", 10000) + `}`, 400, "nested more than"},
		{"deep objects", "POST", "/v1/requests", strings.Repeat(`{"capability":`, 4000), 400, "nested more than"},
		{"big", "POST", "/v1/requests", `{"capability":"` + strings.Repeat("a", 64<<10) + `"}`, 413, "too_large"},
		{"no token", "POST", "/v1/capabilities/drop", `{}`, 400, "token is missing"},
		{"no body", "POST", "/v1/requests", "", 400, "body is missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if s, body := g.do(t, c.method, c.path, c.body); s != c.status || !strings.Contains(body, c.say) {
				t.Errorf("got %d %s, want %d saying %q", s, body, c.status, c.say)
			}
		})
	}
	if len(g.calls) != 0 {
		t.Errorf("the service was called: %v", g.calls)
	}
}

func TestGuestIdempotency(t *testing.T) {
	g := serveGuest(t, newFake(), mailVM, api.GuestOptions{})
	const body = `{"capability":"fs:ro:self:/a"}`
	_, a := g.do(t, "POST", "/v1/requests", body, "Idempotency-Key", "k")
	_, b := g.do(t, "POST", "/v1/requests", body, "Idempotency-Key", "k")
	if a != b || g.count("Request") != 1 {
		t.Errorf("got %s and %s", a, b)
	}
	if s, _ := g.do(t, "POST", "/v1/requests", `{"capability":"fs:ro:self:/b"}`, "Idempotency-Key", "k"); s != 422 {
		t.Errorf("got %d", s)
	}
}

// readStatus reads one response from a raw connection.
func readStatus(t *testing.T, r *bufio.Reader) (int, string) {
	t.Helper()
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b)
}

// wantClosed says how long the server took to close c.
func wantClosed(t *testing.T, c net.Conn, within time.Duration) {
	t.Helper()
	start := time.Now()
	_ = c.SetReadDeadline(start.Add(within))
	if _, err := io.Copy(io.Discard, c); err != nil {
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() {
			t.Errorf("the connection is still open after %v", within)
		}
	}
}

// wantAlive says that an honest client is served meanwhile.
func wantAlive(t *testing.T, g *guest) {
	t.Helper()
	start := time.Now()
	if s, body := g.do(t, "GET", "/v1/self", ""); s != 200 || time.Since(start) > 2*time.Second {
		t.Errorf("an honest client got %d %s after %v", s, body, time.Since(start))
	}
}

func TestHostileSlowHeader(t *testing.T) {
	g := serveGuest(t, newFake(), mailVM, api.GuestOptions{HeaderTimeout: 200 * time.Millisecond})
	c := g.dial(t)
	_, _ = io.WriteString(c, "GET /v1/self HTTP/1.1\r\nHost: b\r\n")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { // one byte now and then is no sign of life
		for ctx.Err() == nil {
			_, _ = io.WriteString(c, "X")
			time.Sleep(20 * time.Millisecond)
		}
	}()
	wantAlive(t, g)
	wantClosed(t, c, 2*time.Second)
	silent := g.dial(t)
	wantClosed(t, silent, 2*time.Second)
}

func TestHostileSlowBody(t *testing.T) {
	g := serveGuest(t, newFake(), mailVM, api.GuestOptions{BodyTimeout: 200 * time.Millisecond})
	for _, path := range []string{"/v1/requests", "/v1/nothing", "/v1/self"} {
		c := g.dial(t)
		_, _ = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{", path)
		wantAlive(t, g)
		r := bufio.NewReader(c)
		if s, body := readStatus(t, r); s != 400 || !strings.Contains(body, "in time") {
			t.Errorf("%s: got %d %s", path, s, body)
		}
		wantClosed(t, c, 2*time.Second)
	}
}

func TestHostileEndlessBody(t *testing.T) {
	g := serveGuest(t, newFake(), mailVM, api.GuestOptions{BodyTimeout: 500 * time.Millisecond})
	for _, framing := range []string{"Transfer-Encoding: chunked", "Content-Length: 99999999999"} {
		c := g.dial(t)
		_, _ = fmt.Fprintf(c, "POST /v1/requests HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\n%s\r\n\r\n", framing)
		chunk := "2000\r\n" + strings.Repeat(" ", 0x2000) + "\r\n"
		sent := make(chan int, 1)
		go func() {
			n := 0
			for {
				m, err := io.WriteString(c, chunk)
				n += m
				if err != nil {
					sent <- n
					return
				}
			}
		}()
		if s, body := readStatus(t, bufio.NewReader(c)); s != 413 {
			t.Errorf("%s: got %d %s", framing, s, body)
		}
		wantClosed(t, c, 3*time.Second)
		if n := <-sent; n > 2<<20 {
			t.Errorf("%s: the server took %d bytes", framing, n)
		}
	}
	wantAlive(t, g)
}

func TestHostileHeaders(t *testing.T) {
	g := serveGuest(t, newFake(), mailVM, api.GuestOptions{})
	for name, head := range map[string]string{
		"large":     "GET /v1/self HTTP/1.1\r\nHost: b\r\nX: " + strings.Repeat("a", 9<<10) + "\r\n\r\n",
		"many":      "GET /v1/self HTTP/1.1\r\nHost: b\r\n" + strings.Repeat("X: a\r\n", 2000) + "\r\n",
		"long line": "GET /" + strings.Repeat("a", 9<<10) + " HTTP/1.1\r\nHost: b\r\n\r\n",
	} {
		c := g.dial(t)
		go func() { _, _ = io.WriteString(c, head) }()
		if s, _ := readStatus(t, bufio.NewReader(c)); s != 431 {
			t.Errorf("%s: got %d", name, s)
		}
		wantClosed(t, c, 2*time.Second)
	}
	c := g.dial(t)
	_, _ = io.WriteString(c, "GET /v1/self HTTP/1.1\r\nHost: b\r\nX: "+strings.Repeat("a", 7<<10)+"\r\n\r\n")
	if s, _ := readStatus(t, bufio.NewReader(c)); s != 200 {
		t.Errorf("a header within the bound got %d", s)
	}
	for name, junk := range map[string]string{
		"binary": "\x00\x01\x02\xff\r\n\r\n", "TLS": "\x16\x03\x01\x02\x00\r\n\r\n", "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"no host": "GET /v1/self HTTP/1.1\r\n\r\n", "two lengths": "POST /v1/requests HTTP/1.1\r\nHost: b\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
		"smuggled": "POST /v1/requests HTTP/1.1\r\nHost: b\r\nContent-Length: 4\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
	} {
		c := g.dial(t)
		_, _ = io.WriteString(c, junk)
		if s, _ := readStatus(t, bufio.NewReader(c)); s < 400 {
			t.Errorf("%s: got %d", name, s)
		}
	}
}

func TestHostileFlood(t *testing.T) {
	g := serveGuest(t, newFake(), mailVM, api.GuestOptions{Rate: 5, Burst: 10})
	c := g.dial(t)
	go func() {
		_, _ = io.WriteString(c, strings.Repeat("GET /v1/capabilities HTTP/1.1\r\nHost: b\r\n\r\n", 200))
	}()
	r := bufio.NewReader(c)
	got := map[int]int{}
	for range 200 {
		s, body := readStatus(t, r)
		got[s]++
		if s == 429 && !strings.Contains(body, `"rate_limited"`) {
			t.Fatalf("got %s", body)
		}
	}
	if got[200] < 10 || got[200] > 30 || got[429] != 200-got[200] || g.count("Capabilities") != got[200] {
		t.Errorf("got %v and %d calls", got, g.count("Capabilities"))
	}
	// Another VM's bucket is its own.
	wantAlive(t, serveGuest(t, newFake(), otherVM, api.GuestOptions{Rate: 5, Burst: 10}))
}

func TestHostileConnections(t *testing.T) {
	g := serveGuest(t, newFake(), mailVM, api.GuestOptions{MaxConns: 3, HeaderTimeout: 300 * time.Millisecond})
	var held []net.Conn
	for range 3 {
		c := g.dial(t)
		_, _ = io.WriteString(c, "GET /v1/self HTTP/1.1\r\nHost: b\r\n\r\n")
		if s, _ := readStatus(t, bufio.NewReader(c)); s != 200 {
			t.Fatalf("got %d", s)
		}
		held = append(held, c)
	}
	for range 5 {
		over := g.dial(t)
		if s, body := readStatus(t, bufio.NewReader(over)); s != 429 || !strings.Contains(body, "rate_limited") {
			t.Errorf("got %d %s", s, body)
		}
		wantClosed(t, over, time.Second)
	}
	_ = held[0].Close()
	for end := time.Now().Add(3 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c := g.dial(t)
		_, _ = io.WriteString(c, "GET /v1/self HTTP/1.1\r\nHost: b\r\n\r\n")
		if s, _ := readStatus(t, bufio.NewReader(c)); s == 200 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the place was not given back")
		}
	}
}

// A guest that does not take its answers costs one connection for a while.
func TestHostileReader(t *testing.T) {
	f := newFake()
	g := serveGuest(t, f, mailVM, api.GuestOptions{WriteTimeout: 200 * time.Millisecond, Rate: 1e6, Burst: 1e6, MaxConns: 2})
	for range 300 {
		_, _ = f.make(mailVM, "fs:ro:self:/"+strings.Repeat("a", 500), "l")
	}
	c := g.dial(t)
	go func() {
		_, _ = io.WriteString(c, strings.Repeat("GET /v1/capabilities HTTP/1.1\r\nHost: b\r\n\r\n", 500))
	}()
	time.Sleep(600 * time.Millisecond)
	wantAlive(t, g)
	wantClosed(t, c, 3*time.Second)
	if n := g.count("Capabilities"); n > 100 {
		t.Errorf("%d answers were made for a guest that takes none", n)
	}
}

func TestGuestCallsEnd(t *testing.T) {
	f := newFake()
	f.delay = func(ctx context.Context) { <-ctx.Done() }
	g := serveGuest(t, f, mailVM, api.GuestOptions{CallTimeout: 100 * time.Millisecond})
	f.fail = context.DeadlineExceeded
	if s, body := g.do(t, "POST", "/v1/requests", `{"capability":"fs:ro:self:/a"}`); s != 504 || !strings.Contains(body, `"timeout"`) {
		t.Errorf("got %d %s", s, body)
	}
}
