package guestcli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const grantJSON = `{"id":"3f0c2f4e-6f38-4a53-9f43-3c1b8d8f0a11","capability":{"kind":"fs"},"spelling":"fs:ro:u:/a",` +
	`"state":"active","created":"2026-01-01T00:00:00Z","mount_path":"/run/spectrum/fs/a","narrowed":false,"new_field":1}`

// broker answers every request with status and body, and notes what came.
type broker struct {
	status         int
	kind, body     string
	path, received string
}

func (b *broker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	in, _ := io.ReadAll(r.Body)
	b.path, b.received = r.Method+" "+r.URL.Path, string(in)
	w.Header().Set("Content-Type", b.kind)
	w.WriteHeader(b.status)
	_, _ = io.WriteString(w, b.body)
}

// run runs the command line against b; nil is a broker that is not there.
func run(t *testing.T, b *broker, args ...string) (status int, out, errs string) {
	t.Helper()
	dial := func(context.Context) (net.Conn, error) { return nil, errors.New("reset") }
	if b != nil {
		l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: b}
		done := make(chan struct{})
		go func() { defer close(done); _ = srv.Serve(l) }()
		defer func() { _ = srv.Close(); <-done }()
		dial = func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", l.Addr().String())
		}
	}
	var o, e bytes.Buffer
	status = Main(t.Context(), Options{
		Version: "v1", Dial: dial, Out: &o, Err: &e,
		Serve: func(context.Context, string) error { return nil },
	}, args)
	return status, o.String(), e.String()
}

func ok(status int, body string) *broker {
	return &broker{status: status, kind: "application/json", body: body}
}

func TestList(t *testing.T) {
	status, out, _ := run(t, ok(200, `{"capabilities":[`+grantJSON+`]}`), "list")
	if status != 0 || !strings.Contains(out, "/run/spectrum/fs/a") || !strings.HasPrefix(out, "GRANT") {
		t.Errorf("%d %q", status, out)
	}
	status, out, _ = run(t, ok(200, `{"capabilities":[`+grantJSON+`]}`), "list", "-o", "json")
	var got struct{ Capabilities []Grant }
	if err := json.Unmarshal([]byte(out), &got); status != 0 || err != nil || len(got.Capabilities) != 1 {
		t.Errorf("%d %q %v", status, out, err)
	}
}

func TestRequestKeepsTheToken(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	b := ok(201, `{"grant":`+grantJSON+`,"token":"SECRET"}`)
	status, out, errs := run(t, b, "request", "fs:ro:self:/a", "--ttl", "1h", "--label", "a", "--token-file", file)
	if status != 0 || strings.Contains(out+errs, "SECRET") {
		t.Fatalf("%d %q %q", status, out, errs)
	}
	if b.path != "POST /v1/requests" || b.received != `{"capability":"fs:ro:self:/a","ttl_seconds":3600,"label":"a"}` {
		t.Errorf("asked %s %s", b.path, b.received)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode() != 0o600 {
		t.Fatalf("%v %v", info, err)
	}
	if status, _, _ := run(t, b, "request", "fs:ro:self:/a", "--token-file", file); status != ExitFailed {
		t.Errorf("wrote over an existing file: %d", status)
	}
	if _, out, _ := run(t, b, "request", "fs:ro:self:/a", "--token"); !strings.Contains(out, "SECRET") {
		t.Errorf("--token printed %q", out)
	}
	if _, out, _ := run(t, b, "request", "fs:ro:self:/a", "-o", "json"); strings.Contains(out, "SECRET") {
		t.Errorf("-o json printed the token: %q", out)
	}
	if status, _, _ := run(t, b, "request", "fs:ro:self:/a/b", "--parent-file", file); status != 0 || !strings.Contains(b.received, `"parent":"SECRET"`) {
		t.Errorf("%d, sent %s", status, b.received)
	}
	status, _, _ = run(t, ok(200, grantJSON), "drop", "--token-file", file)
	if status != 0 {
		t.Errorf("drop: %d", status)
	}
}

func TestExitCodes(t *testing.T) {
	problem := func(status int, code string) *broker {
		return &broker{
			status: status, kind: "application/problem+json",
			body: fmt.Sprintf(`{"title":"T","status":%d,"code":%q,"detail":"why"}`, status, code),
		}
	}
	id := "3f0c2f4e-6f38-4a53-9f43-3c1b8d8f0a11"
	for name, c := range map[string]struct {
		b    *broker
		args []string
		want int
	}{
		"denied":        {problem(403, "denied"), []string{"request", "fs:ro:self:/a"}, ExitDenied},
		"token refused": {problem(403, "token_refused"), []string{"request", "x"}, ExitDenied},
		"malformed":     {problem(400, "invalid"), []string{"request", "x"}, ExitUsage},
		"not found":     {problem(404, "not_found"), []string{"drop", id}, ExitNotFound},
		"narrower":      {problem(409, "narrower"), []string{"request", "x"}, ExitNarrower},
		"timeout":       {problem(504, "timeout"), []string{"request", "x"}, ExitTimeout},
		"rate limited":  {problem(429, "rate_limited"), []string{"list"}, ExitFailed},
		"not cut yet":   {ok(202, strings.Replace(grantJSON, "active", "revoking", 1)), []string{"drop", id}, ExitRevoking},
		"not a broker":  {&broker{status: 500, kind: "text/html", body: "<html>"}, []string{"list"}, ExitFailed},
		"redirect":      {&broker{status: 302, body: ""}, []string{"list"}, ExitFailed},
		"rubbish":       {ok(200, "<html>"), []string{"list"}, ExitFailed},
		"too long":      {ok(200, strings.Repeat(" ", maxAnswer+1)), []string{"list"}, ExitFailed},
		"unreachable":   {nil, []string{"list"}, ExitUnreachable},
		"no command":    {nil, []string{"frob"}, ExitUsage},
		"no argument":   {nil, []string{"request"}, ExitUsage},
		"no such flag":  {nil, []string{"list", "--frob"}, ExitUsage},
		"bad output":    {nil, []string{"list", "-o", "xml"}, ExitUsage},
		"drop nothing":  {nil, []string{"drop"}, ExitUsage},
		"drop a path":   {nil, []string{"drop", "../requests"}, ExitUsage},
		"bad role":      {nil, []string{"serve", "--role", "net"}, ExitUsage},
		"serve":         {nil, []string{"serve"}, ExitOK},
		"version":       {nil, []string{"version"}, ExitOK},
		"self":          {ok(200, `{"id":"x","now":"2026-01-01T00:00:00Z"}`), []string{"self"}, ExitOK},
	} {
		t.Run(name, func(t *testing.T) {
			if status, out, errs := run(t, c.b, c.args...); status != c.want {
				t.Errorf("exit %d, want %d\n%s%s", status, c.want, out, errs)
			}
		})
	}
}

func TestEveryCommandHasAnExample(t *testing.T) {
	for _, cmd := range Command(Options{}).Commands() {
		if cmd.Example == "" || cmd.Short == "" {
			t.Errorf("%s lacks an example or a summary", cmd.Name())
		}
	}
}

func FuzzDecodeAnswer(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		var g Grant
		if decodeAnswer(200, "application/json", b, &g) == nil && !json.Valid(b) {
			t.Fatal("took what is not JSON")
		}
		err := decodeAnswer(403, "application/problem+json", b, &g)
		if err == nil {
			t.Fatal("a refusal became a success")
		}
		if strings.ContainsAny(err.Error(), "\x1b\n\r") {
			t.Fatalf("unprintable: %q", err)
		}
	})
}
