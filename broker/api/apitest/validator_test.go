package apitest_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/api/apitest"
)

// complaints is a test that only takes note.
type complaints struct {
	mu   sync.Mutex
	said []string
}

func (*complaints) Helper() {}

func (c *complaints) Errorf(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.said = append(c.said, fmt.Sprintf(format, args...))
}

func (c *complaints) Fatalf(format string, args ...any) { c.Errorf(format, args...) }

func (c *complaints) take() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := strings.Join(c.said, "\n")
	c.said = nil
	return s
}

// answers is a server that says what it is told to.
func answers(status int, media, body string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", media)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})
}

const (
	names   = `{"names":[{"name":"work","partition":"11111111-1111-4111-8111-111111111111"}]}`
	problem = `{"type":"urn:x","title":"t","status":404,"code":"not_found"}`
	event   = `{"seq":1,"time":"2026-01-02T03:04:05Z","type":"vm.started","actor":{"kind":"broker"}}`
)

func TestValidatorTellsWhatIsNotDocumented(t *testing.T) {
	for _, c := range []struct {
		name, method, path, send string
		status                   int
		media, body              string
		say                      string // empty: nothing is wrong
	}{
		{"good", "GET", "/v1/names", "", 200, "application/json", names, ""},
		{"good problem", "GET", "/v1/vms/a%2Fb", "", 404, "application/problem+json", problem, ""},
		{"good events", "GET", "/v1/events", "", 200, "application/x-ndjson", event + "\n" + event + "\n", ""},
		{"unknown field", "GET", "/v1/names", "", 200, "application/json", `{"names":[],"more":1}`, "more"},
		{"missing field", "GET", "/v1/names", "", 200, "application/json", `{}`, "names"},
		{"null list", "GET", "/v1/names", "", 200, "application/json", `{"names":null}`, "names"},
		{"wrong type", "GET", "/v1/names", "", 200, "application/json", `{"names":[{"name":"work","partition":"1"}]}`, "partition"},
		{"wrong media", "GET", "/v1/names", "", 200, "text/plain", names, "media type"},
		{"wrong status", "GET", "/v1/names", "", 201, "application/json", names, "answered 201"},
		{"not JSON", "GET", "/v1/names", "", 200, "application/json", "<html>", "not JSON"},
		{"two values", "GET", "/v1/names", "", 200, "application/json", names + names, "more than one value"},
		{"unknown code", "GET", "/v1/names", "", 404, "application/problem+json", strings.Replace(problem, "not_found", "lost", 1), "code"},
		{"plain error", "GET", "/v1/names", "", 500, "text/plain", "oops", "media type"},
		{"bad event", "GET", "/v1/events", "", 200, "application/x-ndjson", event + "\n{}\n", "seq"},
		{"unknown route", "GET", "/v1/secret", "", 200, "application/json", "{}", "not in the document"},
		{"accepted query", "GET", "/v1/names?x=1", "", 200, "application/json", names, "query parameter x"},
		{"accepted body", "POST", "/v1/grants", `{"vm":"x"}`, 201, "application/json", "{}", "capability"},
		{"refused body", "POST", "/v1/grants", `{"vm":"x"}`, 400, "application/problem+json", strings.Replace(problem, "not_found", "invalid", 1), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			notes := &complaints{}
			h := apitest.New(notes, api.HostDocument).Wrap(answers(c.status, c.media, c.body))
			r := httptest.NewRequestWithContext(t.Context(), c.method, c.path, strings.NewReader(c.send))
			r.Header.Set("Content-Type", "application/json")
			h.ServeHTTP(httptest.NewRecorder(), r)
			switch got := notes.take(); {
			case c.say == "" && got != "":
				t.Errorf("it complains of %s", got)
			case c.say != "" && !strings.Contains(got, c.say):
				t.Errorf("it says %q, want %q", got, c.say)
			}
		})
	}
}

func TestProxy(t *testing.T) {
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	up, down := filepath.Join(dir, "up"), filepath.Join(dir, "down")
	inner, err := net.Listen("unix", up)
	if err != nil {
		t.Fatal(err)
	}
	var body atomic.Value
	body.Store(names)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answers(200, "application/json", body.Load().(string)).ServeHTTP(w, r)
	})}
	go func() { _ = srv.Serve(inner) }()
	defer srv.Close()
	outer, err := net.Listen("unix", down)
	if err != nil {
		t.Fatal(err)
	}
	notes := &complaints{}
	v := apitest.New(notes, api.HostDocument)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- v.Proxy(ctx, outer, up) }()
	c := api.NewClient(down)
	defer c.Close()
	if got, err := c.ListNames(t.Context()); err != nil || len(got) != 1 {
		t.Errorf("got %v, %v", got, err)
	}
	body.Store(`{"names":[],"x":1}`)
	if _, err := c.ListNames(t.Context()); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if v.Seen()["listNames 200"] != 2 {
		t.Errorf("it has seen %v", v.Seen())
	}
	if !strings.Contains(notes.take(), "x") {
		t.Error("it let an unknown field pass")
	}
}
