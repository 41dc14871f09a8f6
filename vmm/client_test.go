package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// serve answers every call with the handler, on a socket of its own.
func serve(t *testing.T, handler http.HandlerFunc) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Close() })
	return NewClient(socket)
}

func TestAddFS(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		const want = `{"id":"one","num_queues":1,"pci_segment":2,"queue_size":1024,"socket":"/s","tag":"t"}`
		if r.Method != http.MethodPut || r.URL.Path != "/api/v1/vm.add-fs" || strings.TrimSpace(string(body)) != want {
			t.Errorf("%s %s %s", r.Method, r.URL.Path, body)
		}
		if r.ContentLength <= 0 {
			t.Error("the body is chunked, which Cloud Hypervisor cannot read")
		}
		fmt.Fprint(w, `{"id":"one","bdf":"0002:00:03.0"}`)
	})
	bdf, err := c.AddFS(t.Context(), FSConfig{ID: "one", Tag: "t", Socket: "/s", NumQueues: 1, QueueSize: 1024, PCISegment: 2})
	if bdf != "0002:00:03.0" || err != nil {
		t.Errorf("%q, %v", bdf, err)
	}
}

// TestUnsetStaysUnset: Cloud Hypervisor must apply its defaults, so nothing
// that was not set may be sent, an empty console least of all.
func TestUnsetStaysUnset(t *testing.T) {
	text, err := json.Marshal(VMConfig{Payload: PayloadConfig{Kernel: "/k"}})
	if err != nil || string(text) != `{"payload":{"kernel":"/k"}}` {
		t.Errorf("%s, %v", text, err)
	}
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		status int
		body   string
		is     error
		text   string
	}{
		{404, `["Error from API","no such id"]`, ErrNotFound, "vm.remove-device failed: Error from API: no such id"},
		{409, `["not unique"]`, ErrExists, "vm.remove-device failed: not unique"},
		{500, `["a","Could not find an available device slot on the PCI bus"]`, ErrNoSlot, ""},
		{500, "plain text\n", nil, "vm.remove-device failed: plain text"},
		{500, "", nil, "vm.remove-device failed: status 500"},
		{302, "", nil, "vm.remove-device failed: status 302"},
	} {
		c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(tt.status)
			fmt.Fprint(w, tt.body)
		})
		err := c.RemoveDevice(t.Context(), "x")
		var answered *Error
		if !errors.As(err, &answered) || answered.Status != tt.status {
			t.Fatalf("%d %s: %v", tt.status, tt.body, err)
		}
		for _, sentinel := range []error{ErrNotFound, ErrExists, ErrNoSlot} {
			want := tt.is != nil && tt.is.Error() == sentinel.Error()
			if got := errors.Is(err, sentinel); got != want {
				t.Errorf("%v: Is(%v) = %v", err, sentinel, got)
			}
		}
		if tt.text != "" && err.Error() != tt.text {
			t.Errorf("%q; want %q", err, tt.text)
		}
	}
}

func TestOneCallAtATime(t *testing.T) {
	var now, most atomic.Int32
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		most.Store(max(most.Load(), now.Add(1)))
		time.Sleep(10 * time.Millisecond)
		now.Add(-1)
		w.WriteHeader(http.StatusNoContent)
	})
	done := make(chan error)
	for range 5 {
		go func() { done <- c.Pause(t.Context()) }()
	}
	for range 5 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if most.Load() != 1 {
		t.Errorf("%d calls at once", most.Load())
	}
}

// TestDeadlines: neither a VMM that hangs nor a call that waits behind one
// outlives its context.
func TestDeadlines(t *testing.T) {
	release := make(chan struct{})
	c := serve(t, func(http.ResponseWriter, *http.Request) { <-release })
	defer close(release)
	first, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Boot(first) }()
	for len(c.turn) == 0 {
		time.Sleep(time.Millisecond)
	}
	short, cancelShort := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancelShort()
	if err := c.Pause(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the waiting call: %v", err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("the hanging call: %v", err)
	}
	var answered *Error
	if err := NewClient(filepath.Join(t.TempDir(), "nobody")).Boot(t.Context()); err == nil || errors.As(err, &answered) {
		t.Errorf("without a VMM: %v", err)
	}
}

func TestEndlessAnswer(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		chunk := []byte(strings.Repeat("x", 1<<16))
		for r.Context().Err() == nil {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	if _, err := c.Info(t.Context()); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("an endless answer: %v", err)
	}
}
