package api_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/api"
)

func TestEventsAndAudit(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	ctx, c := t.Context(), h.client
	h.emit(2500)
	last := uint64(0)
	for e, err := range c.Events(ctx, api.EventQuery{After: 1400}, false) {
		if err != nil {
			t.Fatal(err)
		}
		if last != 0 && e.Seq != last+1 {
			t.Errorf("%d came after %d", e.Seq, last)
		}
		last = e.Seq
	}
	if last != 2400 { // a page of 1000
		t.Errorf("the page ended at %d", last)
	}
	page := must[api.EventList](t)(c.Audit(ctx, api.EventQuery{After: 2490, Limit: 5}))
	if len(page.Events) != 5 || page.Next != 2495 || !page.More {
		t.Errorf("got %d events, next %d, more %v", len(page.Events), page.Next, page.More)
	}
	page = must[api.EventList](t)(c.Audit(ctx, api.EventQuery{After: page.Next, Limit: 5}))
	if len(page.Events) != 5 || page.Next != 2500 || page.More {
		t.Errorf("got %d events, next %d, more %v", len(page.Events), page.Next, page.More)
	}
	page = must[api.EventList](t)(c.Audit(ctx, api.EventQuery{After: page.Next}))
	if page.Events == nil || len(page.Events) != 0 || page.Next != 2500 {
		t.Errorf("the page after the last is %+v", page)
	}
	since, until := epoch, epoch.Add(time.Hour)
	q := api.EventQuery{After: 7, VM: "work/mail", Grant: "abcdefgh", Types: []string{"grant.", "vm.started"}, Since: &since, Until: &until, Actor: "uid:1000", Decision: "deny", Records: true, Limit: 3}
	must[api.EventList](t)(c.Audit(ctx, q))
	got := h.query[len(h.query)-1]
	if got.After != 7 || got.VM != q.VM || got.Grant != q.Grant || len(got.Types) != 2 || got.Actor != q.Actor || got.Decision != q.Decision || !got.Records || !got.Since.Equal(since) || !got.Until.Equal(until) {
		t.Errorf("the query arrived as %+v", got)
	}
}

func TestFollow(t *testing.T) {
	h := serveHost(t, api.HostOptions{MaxFollowers: 1})
	h.emit(1500)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []uint64
	for e, err := range h.client.Events(ctx, api.EventQuery{After: 10}, true) {
		if err != nil {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("the stream ended with %v", err)
			}
			break
		}
		got = append(got, e.Seq)
		switch e.Seq {
		case 1500: // the end of what there was: now live
			for _, err := range h.client.Events(t.Context(), api.EventQuery{}, true) {
				wantCode(t, err, api.CodeUnavailable, "too many event streams")
			}
			go h.emit(3)
		case 1503:
			cancel()
		}
	}
	if len(got) != 1493 {
		t.Fatalf("got %d events", len(got))
	}
	for i, seq := range got {
		if seq != uint64(i+11) {
			t.Fatalf("event %d has seq %d", i, seq)
		}
	}
}

func TestFollowEndsWithTheBroker(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	h.emit(1)
	start := time.Now()
	for e, err := range h.client.Events(t.Context(), api.EventQuery{}, true) {
		if err != nil {
			t.Errorf("the stream ended with %v", err)
		}
		if e.Seq == 1 {
			go h.stop()
		}
	}
	if took := time.Since(start); took > 900*time.Millisecond {
		t.Errorf("the stream held the stop up for %v", took)
	}
}

// A failure in the middle must not look like the end.
func TestFollowBreaksLoudly(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	h.emit(1)
	var last error
	for e, err := range h.client.Events(t.Context(), api.EventQuery{}, true) {
		last = err
		if e.Seq == 1 {
			h.mu.Lock()
			h.fail = errors.New("the ledger is gone")
			h.mu.Unlock()
			h.emit(1)
		}
	}
	if !errors.Is(last, api.ErrUnreachable) {
		t.Errorf("the stream ended with %v", last)
	}
}

func TestSlowReaderIsCutOff(t *testing.T) {
	h := serveHost(t, api.HostOptions{SlowReader: 100 * time.Millisecond})
	h.emit(10000)
	conn, err := net.Dial("unix", h.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET /v1/events?follow=true HTTP/1.1\r\nHost: broker\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if strings.Contains(h.log.String(), "stream ended early") {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the slow reader was not cut off")
		}
	}
	_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, err := io.Copy(io.Discard, conn)
	if err != nil {
		t.Errorf("after %d bytes: %v", n, err)
	}
	// The others go on.
	must[api.Health](t)(h.client.Health(t.Context()))
}

func TestConsole(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	_, err := h.client.Console(t.Context(), "nobody")
	wantCode(t, err, api.CodeNotFound)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	conn := must[net.Conn](t)(h.client.Console(ctx, "work/mail"))
	cancel() // bounds the opening only
	for _, s := range []string{"hello\n", "again\n"} {
		if _, err := io.WriteString(conn, s); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, len(s))
		if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != strings.ToUpper(s) {
			t.Fatalf("read %q, %v", buf, err)
		}
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	// What comes with the request is not lost.
	raw, err := net.Dial("unix", h.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	_, _ = io.WriteString(raw, "GET /v1/vms/work%2Fmail/console HTTP/1.1\r\nHost: b\r\nConnection: keep-alive, Upgrade\r\nUpgrade: spectrum-console\r\n\r\nearly")
	buf := make([]byte, 4096)
	var got string
	_ = raw.SetReadDeadline(time.Now().Add(5 * time.Second))
	for !strings.HasSuffix(got, "EARLY") {
		n, err := raw.Read(buf)
		if err != nil {
			t.Fatalf("after %q: %v", got, err)
		}
		got += string(buf[:n])
	}
	if !strings.HasPrefix(got, "HTTP/1.1 101 ") {
		t.Errorf("got %q", got)
	}
	// An open console does not hold up the stop.
	start := time.Now()
	h.stop()
	if took := time.Since(start); took > 900*time.Millisecond {
		t.Errorf("stopping took %v", took)
	}
	if _, err := raw.Read(buf); err == nil {
		t.Error("the console is still open")
	}
	if h.valid.Seen()["console 101"] == 0 {
		t.Errorf("the upgrade was not checked: %v", h.valid.Seen())
	}
}
