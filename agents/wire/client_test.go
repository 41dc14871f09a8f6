package wire

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// agentSaying is a guest that reads one request's head and answers with raw.
func agentSaying(t *testing.T, raw string) *Client {
	t.Helper()
	return NewClient(func(context.Context) (net.Conn, error) {
		here, there := net.Pipe()
		go func() {
			defer there.Close()
			if r, err := http.ReadRequest(bufio.NewReader(there)); err == nil {
				_, _ = io.Copy(io.Discard, r.Body)
			}
			_, _ = io.WriteString(there, raw)
		}()
		return here, nil
	})
}

func reply(status int, body string) string {
	return fmt.Sprintf("HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
}

const healthy = `{"agent":"a","version":"1","role":"app","boot_id":"b"}`

func TestHealth(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	h, err := agentSaying(t, reply(200, healthy)).Health(ctx)
	if err != nil || h != (Health{Agent: "a", Version: "1", Role: "app", BootID: "b"}) {
		t.Fatalf("%+v, %v", h, err)
	}
}

func TestHostileAnswers(t *testing.T) {
	long := strings.Repeat("x", MaxBody)
	for name, c := range map[string]struct {
		raw  string
		want error
		says string
	}{
		"nothing":             {"", ErrUnreachable, "ended early"},
		"not http":            {"SSH-2.0-hello\r\n\r\n", ErrProtocol, "malformed"},
		"endless status line": {"HTTP/1.1 200 " + long, ErrProtocol, "headers are longer"},
		"endless headers":     {"HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", MaxHeader), ErrProtocol, "headers are longer"},
		"declared too long":   {"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", ErrProtocol, "body is longer"},
		"too long, no length": {"HTTP/1.1 200 OK\r\n\r\n" + long + long, ErrProtocol, "body is longer"},
		"too long, chunked":   {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1\r\nx\r\n", MaxBody), ErrProtocol, "body is longer"},
		"body cut short":      {"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", ErrUnreachable, "ended early"},
		"continue for ever":   {strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 100), ErrProtocol, "status 100"},
		"redirect":            {"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", ErrProtocol, "status 302"},
		"no content":          {"HTTP/1.1 204 No Content\r\n\r\n", ErrProtocol, "status 204"},
		"not json":            {reply(200, "hello"), ErrProtocol, "invalid character"},
		"unknown field":       {reply(200, `{"agent":"a","more":1}`), ErrProtocol, "unknown field"},
		"field twice":         {reply(200, `{"agent":"a","AGENT":"b"}`), ErrProtocol, "given twice"},
		"two values":          {reply(200, healthy+healthy), ErrProtocol, "goes on"},
		"deep":                {reply(200, strings.Repeat("[", 10000)), ErrProtocol, "deeper"},
		"not utf-8":           {reply(200, "{\"agent\":\"\xff\"}"), ErrProtocol, "UTF-8"},
		"escape sequence":     {reply(200, `{"agent":"\u001b[31m","version":"1","role":"app","boot_id":"b"}`), ErrProtocol, "not printable"},
		"long string":         {reply(200, `{"agent":"`+strings.Repeat("a", 65)+`"}`), ErrProtocol, "too long"},
		"error without code":  {reply(500, `{"code":"","message":"x"}`), ErrProtocol, "unknown code"},
		"error in html":       {reply(500, `<html>`), ErrProtocol, "status 500"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			_, err := agentSaying(t, c.raw).Health(ctx)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %v saying %q", err, c.want, c.says)
			}
		})
	}
}

func TestAgentsWordsAreMadePrintable(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, err := agentSaying(t, reply(409, `{"code":"conflict","message":"a\u001b[2J`+strings.Repeat("b", 500)+`"}`)).Health(ctx)
	refused, ok := errors.AsType[*AgentError](err)
	if !ok || refused.Code != CodeConflict || len(refused.Message) > 200 || strings.ContainsRune(refused.Message, '\x1b') {
		t.Fatalf("%#v", err)
	}
}

func TestSilentAgentMeetsTheDeadline(t *testing.T) {
	client := NewClient(func(context.Context) (net.Conn, error) {
		here, there := net.Pipe()
		t.Cleanup(func() { _ = there.Close() })
		return here, nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := client.Health(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

func TestCallsNeedADeadline(t *testing.T) {
	client := NewClient(func(context.Context) (net.Conn, error) {
		t.Error("dialled")
		return nil, errors.New("no")
	})
	if _, err := client.Health(context.Background()); !errors.Is(err, ErrNoDeadline) {
		t.Fatal(err)
	}
}

func TestMountChecksBothWays(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	good := MountRequest{Tag: "t", Label: "l", TimeoutMS: 1}
	_, err := agentSaying(t, reply(200, `{"path":"/etc"}`)).Mount(ctx, good)
	if !errors.Is(err, ErrProtocol) {
		t.Errorf("a path elsewhere: %v", err)
	}
	for want, bad := range map[error]MountRequest{
		ErrLabel:   {Tag: "t", Label: "../l", TimeoutMS: 1},
		ErrTag:     {Tag: "a b", Label: "l", TimeoutMS: 1},
		ErrFile:    {Tag: "t", Label: "l", File: "a/b", TimeoutMS: 1},
		ErrTimeout: {Tag: "t", Label: "l"},
	} {
		if _, err := agentSaying(t, "").Mount(ctx, bad); !errors.Is(err, want) {
			t.Errorf("%+v: %v, want %v", bad, err, want)
		}
	}
	list := `{"mounts":[{"label":"l","tag":"t","path":"/l","read_only":true,"file":""}]}`
	if _, err := agentSaying(t, reply(200, list)).Mounts(ctx); !errors.Is(err, ErrProtocol) {
		t.Errorf("a listed path elsewhere: %v", err)
	}
	if err := agentSaying(t, "HTTP/1.1 204 No Content\r\n\r\n").Unmount(ctx, "l"); err != nil {
		t.Error(err)
	}
}

func TestDialHybrid(t *testing.T) {
	for name, c := range map[string]struct{ answer, says string }{
		"ok":         {"OK 1073741824\nhello", ""},
		"reset":      {"", ErrNoListener.Error()},
		"rubbish":    {"NO\n", "answered"},
		"no number":  {"OK x\n", "answered"},
		"no newline": {strings.Repeat("O", 100), "no end"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "v")
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			asked := make(chan string, 1)
			go func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				line, _ := bufio.NewReader(conn).ReadString('\n')
				asked <- line
				_, _ = io.WriteString(conn, c.answer)
				_ = conn.Close()
			}()
			conn, err := DialHybrid(t.Context(), path, 220)
			if got := <-asked; got != "CONNECT 220\n" {
				t.Errorf("asked %q", got)
			}
			if c.says != "" {
				if err == nil || !strings.Contains(err.Error(), c.says) {
					t.Fatalf("got %v, want %q", err, c.says)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if rest, _ := io.ReadAll(conn); string(rest) != "hello" {
				t.Errorf("rest is %q", rest)
			}
		})
	}
}

func TestDialHybridMeetsTheDeadline(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := DialHybrid(ctx, path, 220); err == nil || time.Since(start) > 3*time.Second {
		t.Fatalf("%v after %v", err, time.Since(start))
	}
}
