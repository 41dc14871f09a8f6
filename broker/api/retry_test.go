package api_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"testing"

	"spectrum-os.org/broker/broker/api"
)

// between is a socket before a host's. Of the first cut connections it passes
// one request on, and breaks them when the answer is there.
func between(t *testing.T, h *host, cut int32) (client *api.Client, connections *atomic.Int32) {
	t.Helper()
	socket := filepath.Join(socketDir(t), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	connections = new(atomic.Int32)
	pass := func(near net.Conn, broken bool) {
		defer near.Close()
		far, err := net.Dial("unix", h.socket)
		if err != nil {
			t.Error(err)
			return
		}
		defer far.Close()
		if !broken {
			go func() { _, _ = io.Copy(far, near) }()
			_, _ = io.Copy(near, far)
			return
		}
		req, err := http.ReadRequest(bufio.NewReader(near))
		if err == nil {
			err = req.Write(far)
		}
		if err == nil {
			var resp *http.Response
			if resp, err = http.ReadResponse(bufio.NewReader(far), req); err == nil {
				_, err = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
			}
		}
		if err != nil {
			t.Error(err)
		}
	}
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			go pass(near, connections.Add(1) <= cut)
		}
	}()
	client = api.NewClient(socket)
	t.Cleanup(client.Close)
	return client, connections
}

// TestLostAnswer: the grant was made when the connection broke. It is asked for
// again and not made again.
func TestLostAnswer(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	client, connections := between(t, h, 1)
	req := api.GrantRequest{VM: "work/mail", Capability: "fs:ro:work:/a"}
	g, err := client.Grant(t.Context(), req)
	if err != nil || g.Spelling == "" {
		t.Fatalf("got %+v, %v", g, err)
	}
	if n, calls := connections.Load(), h.count("Grant"); n != 2 || calls != 1 {
		t.Errorf("%d connections, %d grants; want 2 and 1", n, calls)
	}
	// Another call is another grant, though all is the same.
	again, err := client.Grant(t.Context(), req)
	if err != nil || again.ID == g.ID || h.count("Grant") != 2 {
		t.Errorf("got %s after %s, %v, %d grants", again.ID, g.ID, err, h.count("Grant"))
	}
}

// TestLostAnswers: it is tried once more, not for ever.
func TestLostAnswers(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	client, connections := between(t, h, 100)
	_, err := client.Grant(t.Context(), api.GrantRequest{VM: "work/mail", Capability: "fs:ro:work:/a"})
	if !errors.Is(err, api.ErrUnreachable) || connections.Load() != 2 || h.count("Grant") != 1 {
		t.Errorf("got %v, %d connections, %d grants", err, connections.Load(), h.count("Grant"))
	}
}
