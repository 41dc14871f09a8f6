package cli_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/cmd/spectrum-cap/internal/cli"
)

// recorded is a fake broker with n real events of a ledger.
func recorded(t *testing.T, n int) *fake {
	t.Helper()
	l, err := ledger.Open(t.Context(), ledger.Options{Dir: t.TempDir(), Kinds: capabilities.NewKinds(capabilities.FS{}), Clock: clock.System{}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = l.Update(t.Context(), func(tx *ledger.Tx) error {
		for i := 1; i < n; i++ {
			e := ledger.Event{
				Type: ledger.BrokerStarted, Actor: ledger.Actor{Kind: ledger.ActorBroker},
				Data: ledger.JSON(map[string]string{"name": "p" + strconv.Itoa(i)}),
			}
			if err := tx.Append(e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	page, err := l.Read(t.Context(), ledger.Reading{Records: true})
	if err != nil {
		t.Fatal(err)
	}
	f := newFake()
	f.events, f.records = nil, page.Records
	for _, e := range page.Events {
		f.events = append(f.events, api.Event{
			Seq: e.Seq, Time: e.Time, Type: string(e.Type), Actor: api.Actor{Kind: e.Actor.Kind}, Data: e.Data, Hash: e.Hash.String(), Prev: e.Prev.String(),
		})
	}
	return f
}

func TestExportAndVerify(t *testing.T) {
	const n = 2500 // more than a page
	f := recorded(t, n)
	socket := serve(t, f)
	dir := t.TempDir()
	file := filepath.Join(dir, "audit.ndjson")
	expect := func(want int, out, errs string, args ...string) {
		t.Helper()
		code, stdout, stderr := run(t, socket, args...)
		if code != want || !strings.Contains(stdout, out) || !strings.Contains(stderr, errs) {
			t.Errorf("%v: code %d, %q, %q; want %d, %q, %q", args, code, stdout, stderr, want, out, errs)
		}
	}
	head := f.events[n-1].Hash
	anchor := strconv.Itoa(n) + ":" + head
	expect(0, "exported: events 1 to 2500, head "+head, "", "audit", "export", file)
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	expect(0, "intact: 2500 events, head "+head+"\nanchors that are part of it: 1\n", "", "audit", "verify", "--file", file, "--anchor", anchor)
	expect(0, `"last": 2500`, "", "audit", "verify", "--file", file, "-o", "json")
	expect(2, "", "exists already; --force replaces it", "audit", "export", file)
	expect(0, "exported: events 2401 to 2500", "", "audit", "export", "--force", "--after", "2400", file)
	expect(0, "intact: 100 events from event 2401 on", "", "audit", "verify", "--file", file)
	expect(1, "", "the audit is broken at event 1: anchor: it was anchored, and what is verified begins at event 2401", "audit", "verify", "--file", file, "--anchor", "1:"+f.events[0].Hash)
	expect(2, "", "no anchor", "audit", "verify", "--anchor", "12")
	expect(2, "", "needs an --anchor", "audit", "verify", "--from-anchor")
	expect(2, "", "does not go with --file", "audit", "verify", "--file", file, "--anchor", anchor, "--from-anchor")
	expect(2, "", "exclude each other", "audit", "verify", "--file", file, "--state", dir)
	expect(0, `"anchors": 1`, "", "audit", "verify", "--anchor", anchor, "--from-anchor", "-o", "json")
	expect(1, "", "no such file", "audit", "verify", "--file", filepath.Join(dir, "none"))
	expect(2, "", "is beyond the end", "audit", "export", "--after", "2501", filepath.Join(dir, "none"))
	expect(1, "", "there is no event to export", "audit", "export", "--after", "2500", filepath.Join(dir, "none"))

	// A broker that lies is caught while the file is written, and no file is left.
	f.mu.Lock()
	f.records[1700] = f.records[1600]
	f.mu.Unlock()
	expect(1, "", "broken at event 1601: gap", "audit", "export", filepath.Join(dir, "none"))
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left in the directory: %v, %v", entries, err)
	}

	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(string(b), `"name":"p2450"`, `"name":"p2451"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	expect(1, "", "the audit is broken at event 2451: hash mismatch: what is to be read of it is not what its record says", "audit", "verify", "--file", file)
}

// rehosted serves f on a socket that can be closed and served again.
type rehosted struct {
	t      *testing.T
	f      *fake
	socket string
	stop   func()
}

func (r *rehosted) serve() {
	l, err := net.Listen("unix", r.socket)
	if err != nil {
		r.t.Error(err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	h := api.NewHostHandler(r.f, api.HostOptions{})
	go func() { done <- api.ServeHost(ctx, l, h, api.ServeOptions{}) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Error(err)
		}
	})
}

// TestFollowReconnects restarts the broker under a follower: it gets every event
// once, and says on stderr what happened.
func TestFollowReconnects(t *testing.T) {
	dir, err := os.MkdirTemp("", "cap")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	r := &rehosted{t: t, f: newFake(), socket: filepath.Join(dir, "s")}
	r.f.events = nil
	r.serve()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	out, in := io.Pipe()
	var errs strings.Builder
	code := make(chan int, 1)
	go func() {
		code <- cli.Main(ctx, cli.Host{
			Args:  []string{"--socket", r.socket, "events", "--follow", "-o", "json"},
			Stdin: strings.NewReader(""), Stdout: in, Stderr: &errs, Getenv: func(string) string { return "" },
		})
		_ = in.Close()
	}()
	const rounds, each = 3, 50
	next := uint64(1)
	lines := bufio.NewScanner(out)
	for round := range rounds {
		r.f.mu.Lock()
		for range each {
			r.f.record("broker.started", nil, nil, `{}`)
		}
		r.f.mu.Unlock()
		if round > 0 {
			r.serve() // recorded before it is back, as also while it is away
		}
		for range each {
			if !lines.Scan() {
				t.Fatalf("in round %d the output ended: %s", round, errs.String())
			}
			var e api.Event
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil || e.Seq != next {
				t.Fatalf("got %s (%v), want event %d", lines.Text(), err, next)
			}
			next++
		}
		r.stop()
	}
	cancel() // as an interrupt does
	if got := <-code; got != 0 {
		t.Errorf("code %d: %s", got, errs.String())
	}
	for _, says := range []string{"connecting again, to go on after event 50", "the broker is back; going on after event 50", "to go on after event 100"} {
		if !strings.Contains(errs.String(), says) {
			t.Errorf("it did not say %q:\n%s", says, errs.String())
		}
	}
}

// A broker that stays away, and one that never was there, end it.
func TestFollowGivesUp(t *testing.T) {
	f := newFake()
	f.events = nil
	dir, err := os.MkdirTemp("", "cap")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	r := &rehosted{t: t, f: f, socket: filepath.Join(dir, "s")}
	if code, _, stderr := run(t, r.socket, "events", "--follow"); code != 7 || strings.Contains(stderr, "again") {
		t.Errorf("without a broker: code %d, %s", code, stderr)
	}
	f.record("broker.started", nil, nil, `{}`)
	r.serve()
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		time.Sleep(100 * time.Millisecond)
		r.stop()
	}()
	code, stdout, stderr := run(t, r.socket, "audit", "--follow", "--reconnect-for", "300ms")
	<-stopped
	if code != 7 || !strings.Contains(stdout, "broker.started") || !strings.Contains(stderr, "go on with --after 1") {
		t.Errorf("code %d, %q, %s", code, stdout, stderr)
	}
	// What the broker refuses is not asked again.
	r.serve()
	defer r.stop()
	if code, _, stderr := run(t, r.socket, "events", "--follow", "--after", "9"); code != 2 || !strings.Contains(stderr, "beyond the end") {
		t.Errorf("code %d, %s", code, stderr)
	}
}

// failingWriter is an output that takes nothing more.
type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("disk full") }

// What cannot be printed ends it too, instead of being asked for again and again.
func TestFollowEndsWithItsOutput(t *testing.T) {
	f := newFake()
	socket := serve(t, f)
	f.mu.Lock()
	f.record("broker.started", nil, nil, `{}`)
	f.mu.Unlock()
	var errs strings.Builder
	code := cli.Main(t.Context(), cli.Host{
		Args: []string{"--socket", socket, "events", "--follow", "-o", "json"}, Stdin: strings.NewReader(""),
		Stdout: failingWriter{}, Stderr: &errs, Getenv: func(string) string { return "" },
	})
	if code != 1 || !strings.Contains(errs.String(), "disk full") {
		t.Errorf("code %d, %s", code, errs.String())
	}
}
