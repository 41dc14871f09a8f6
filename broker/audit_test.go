package broker

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/policy"
)

// auditing is a broker of which only the ledger and the host API are there. It
// can be ended and begun again on the same state and socket.
type auditing struct {
	*Broker
	t           *testing.T
	dir, socket string
	slow        time.Duration
	client      *api.Client
	stop        func()
}

func newAuditing(t *testing.T) *auditing {
	t.Helper()
	// Not t.TempDir: a socket's path must be short.
	run, err := os.MkdirTemp("", "audit")
	if err != nil {
		t.Fatal(err)
	}
	a := &auditing{t: t, dir: t.TempDir(), socket: filepath.Join(run, "s"), slow: 10 * time.Second}
	a.client = api.NewClient(a.socket)
	a.begin()
	t.Cleanup(func() {
		a.stop()
		a.client.Close()
		_ = os.RemoveAll(run)
	})
	return a
}

func (a *auditing) begin() {
	a.t.Helper()
	kinds := capabilities.NewKinds(capabilities.FS{})
	b := &Broker{
		o: Options{StateDir: a.dir, Clock: clock.System{}}, log: slog.New(slog.DiscardHandler), kinds: kinds, running: map[uuid.UUID]*unit{},
	}
	b.inventory.Store(&inventory{})
	b.metrics = newMetrics(b)
	b.engines = policy.NewEngines(policy.Options{}) // none is ever loaded
	var err error
	b.ledger, err = ledger.Open(context.Background(), ledger.Options{Dir: a.dir, Kinds: kinds, Clock: b.o.Clock, Observe: b.metrics.committed})
	if err != nil {
		a.t.Fatal(err)
	}
	b.reconciler = reconcile.New(reconcile.Options{Ledger: b.ledger, Clock: b.o.Clock})
	l, err := api.ListenHost(a.socket, 0o600, "")
	if err != nil {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	h := api.NewHostHandler(b, api.HostOptions{SlowReader: a.slow, Streams: &b.metrics.streams})
	go func() { done <- api.ServeHost(ctx, l, h, api.ServeOptions{}) }()
	a.Broker = b
	a.stop = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, b.ledger.Close()); err != nil {
			a.t.Error(err)
		}
		b.engines.Close()
	})
}

// record appends n events of about 200 bytes each.
func (a *auditing) record(n int) {
	a.t.Helper()
	_, err := a.ledger.Update(context.Background(), func(tx *ledger.Tx) error {
		for range n {
			e := ledger.Event{Type: ledger.BrokerStarted, Actor: brokerActor, Data: ledger.JSON(map[string]string{"version": strings.Repeat("v", 100)})}
			if err := tx.Append(e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		a.t.Fatal(err)
	}
}

// raw opens a stream of events behind a cursor.
func (a *auditing) raw(after uint64) net.Conn {
	a.t.Helper()
	conn, err := net.Dial("unix", a.socket)
	if err != nil {
		a.t.Fatal(err)
	}
	if _, err := fmt.Fprintf(conn, "GET /v1/events?follow=true&after=%d HTTP/1.0\r\nHost: broker\r\n\r\n", after); err != nil {
		a.t.Fatal(err)
	}
	return conn
}

// lines are the whole lines that a connection gives until it ends or fn says that
// it has enough. HTTP/1.0 has no chunks between them.
func lines(conn net.Conn, fn func(seq uint64) bool) {
	r := bufio.NewReader(conn)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return // what came of a line that is not whole does not count
		}
		var e struct{ Seq uint64 }
		if json.Unmarshal([]byte(line), &e) == nil && e.Seq > 0 && !fn(e.Seq) {
			return
		}
	}
}

// TestStalledReaderLosesNothing has a reader that stops to read while thousands of
// events are written, is cut off, and comes again with its cursor, several times.
func TestStalledReaderLosesNothing(t *testing.T) {
	a := newAuditing(t)
	a.stop()
	a.slow = 150 * time.Millisecond
	a.begin()
	const writes, each = 40, 500
	total := uint64(1 + writes*each)
	var writing sync.WaitGroup
	writing.Go(func() {
		for range writes {
			a.record(each)
		}
	})
	var got []uint64
	for stalls := range 3 {
		conn := a.raw(uint64(len(got)))
		took := 0
		lines(conn, func(seq uint64) bool {
			got = append(got, seq)
			took++
			return took < 200
		})
		if took < 200 {
			t.Fatalf("the stream ended after %d events", took)
		}
		for end := time.Now().Add(20 * time.Second); a.metrics.streams.Cut() <= int64(stalls); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("a reader that does not read was not cut off")
			}
		}
		// Where it stands is what it made use of, whatever the kernel still holds.
		got = got[:len(got)-50]
		_ = conn.Close()
	}
	writing.Wait()
	conn := a.raw(uint64(len(got)))
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	lines(conn, func(seq uint64) bool {
		got = append(got, seq)
		return seq < total
	})
	if uint64(len(got)) != total {
		t.Fatalf("it got %d of %d events", len(got), total)
	}
	for i, seq := range got {
		if seq != uint64(i+1) {
			t.Fatalf("event %d it got is number %d", i+1, seq)
		}
	}
	if n := valueOf(t, a.metrics, "spectrum_event_streams_cut_total"); n != 3 {
		t.Errorf("%v streams are said to have been cut off", n)
	}
}

// TestFollowAcrossRestarts resumes from its cursor in the next broker.
func TestFollowAcrossRestarts(t *testing.T) {
	a := newAuditing(t)
	const rounds, each = 4, 300
	var got []uint64
	for round := range rounds {
		if round > 0 {
			a.begin()
		}
		a.record(each)
		head, _ := a.ledger.Head()
		for e, err := range a.client.Events(t.Context(), api.EventQuery{After: uint64(len(got))}, true) {
			if err != nil {
				t.Fatalf("in round %d: %v", round, err)
			}
			if got = append(got, e.Seq); e.Seq == head {
				a.stop()
			}
		}
	}
	for i, seq := range got {
		if seq != uint64(i+1) {
			t.Fatalf("event %d it got is number %d", i+1, seq)
		}
	}
	if len(got) < rounds*each {
		t.Errorf("it got %d events", len(got))
	}
	a.begin()
	if n := valueOf(t, a.metrics, "spectrum_event_streams_open"); n != 0 {
		t.Errorf("%v streams are said to be open", n)
	}
}

// A cursor of another ledger is refused, in words, wherever it is brought.
func TestCursorOfAnotherLedger(t *testing.T) {
	a := newAuditing(t)
	a.record(5)
	q := api.EventQuery{After: 7}
	_, err := a.client.Audit(t.Context(), q)
	errs := []error{err}
	for _, follow := range []bool{false, true} {
		for _, err := range a.client.Events(t.Context(), q, follow) {
			errs = append(errs, err)
		}
	}
	if len(errs) != 3 {
		t.Fatalf("%d answers", len(errs))
	}
	for _, err := range errs {
		if api.CodeOf(err) != api.CodeInvalid || !strings.Contains(err.Error(), "ends at event 6, and the cursor is 7") {
			t.Errorf("it is answered %v", err)
		}
	}
}

// A filter that nothing matches is answered page by page, each in a bounded time.
func TestRareEventsComeInPages(t *testing.T) {
	a := newAuditing(t)
	for range 5 {
		a.record(maxScanned / 4)
	}
	q := api.EventQuery{Types: []string{"name."}}
	page, err := a.client.Audit(t.Context(), q)
	if err != nil || !page.More || page.Next != maxScanned || len(page.Events) != 0 {
		t.Fatalf("%d events, next %d, more %v, %v", len(page.Events), page.Next, page.More, err)
	}
	q.After = page.Next
	head, _ := a.ledger.Head()
	if page, err = a.client.Audit(t.Context(), q); err != nil || page.More || page.Next != head {
		t.Errorf("next %d, more %v, %v", page.Next, page.More, err)
	}
	// A stream hides the pages.
	n := 0
	for _, err := range a.client.Events(t.Context(), api.EventQuery{Types: []string{"broker."}, Limit: maxScanned/2 - 1}, false) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n != maxScanned/2-1 && n != 10000 {
		t.Errorf("%d events were streamed", n)
	}
}

// TestAuditFilters has real decisions of each outcome, and finds them.
func TestAuditFilters(t *testing.T) {
	g := newGranting(t, allowsAll, `package spectrum.grant

allow if not startswith(input.capability.resource.path, "/no")

ask contains "may it?" if input.capability.resource.path == "/ask"

deny contains "never" if 1 / count({x | x := input.capability.resource.path; x != "/broken"}) > 2
`)
	allowed := g.granted(mail1, "/a")
	for _, p := range []string{"/no", "/ask", "/broken"} {
		if _, err := g.grant(t.Context(), g.asks(mail1, p)); err == nil {
			t.Fatalf("%s was granted", p)
		}
	}
	g.granted(mail2, "/b", func(r *request) { r.actor = ledger.Actor{Kind: ledger.ActorVM, VM: mail2} })
	zero := int64(0)
	if _, err := g.grant(t.Context(), g.asks(mail1, "/a", func(r *request) { r.ttl = &zero })); err == nil {
		t.Fatal("a lifetime of nothing was granted")
	}
	long := uuid.New()
	past := ledger.Event{Type: ledger.VMConsole, Actor: brokerActor, VM: long}
	g.append(past)
	since := time.Now()

	paths := func(q api.EventQuery) (out []string) {
		t.Helper()
		q.Limit = 1000
		list, err := g.Events(t.Context(), q)
		if err != nil {
			t.Fatalf("%+v: %v", q, err)
		}
		for _, e := range list.Events {
			if !strings.HasPrefix(e.Type, "grant.requested") && !strings.HasPrefix(e.Type, "grant.denied") {
				out = append(out, e.Type)
				continue
			}
			var d struct {
				Capability struct{ Resource struct{ Path string } }
			}
			if err := json.Unmarshal(e.Data, &d); err != nil {
				t.Fatal(err)
			}
			out = append(out, d.Capability.Resource.Path)
		}
		return out
	}
	requests := []string{"grant.requested", "grant.denied"}
	for name, c := range map[string]struct {
		q    api.EventQuery
		want []string
	}{
		"allow":          {api.EventQuery{Decision: "allow"}, []string{"/a", "/b"}},
		"deny":           {api.EventQuery{Decision: "deny"}, []string{"/no", "/a"}}, // the last was refused before policy was asked
		"ask":            {api.EventQuery{Decision: "ask"}, []string{"/ask"}},
		"error":          {api.EventQuery{Decision: "error"}, []string{"/broken"}},
		"of a type":      {api.EventQuery{Decision: "deny", Types: []string{"grant.denied"}}, []string{"/no", "/a"}},
		"of a VM":        {api.EventQuery{Decision: "allow", VM: mail2.String()}, []string{"/b"}},
		"of a grant":     {api.EventQuery{Grant: allowed.ID.String(), Types: requests}, []string{"/a"}},
		"by a person":    {api.EventQuery{Actor: "person", Types: requests}, []string{"/a", "/no", "/ask", "/broken", "/a"}},
		"by a user":      {api.EventQuery{Actor: "uid:1000", Types: []string{"grant.requested"}}, []string{"/a"}},
		"by another":     {api.EventQuery{Actor: "uid:1001"}, nil},
		"by a VM":        {api.EventQuery{Actor: "vm:" + mail2.String(), Types: requests}, []string{"/b"}},
		"from now":       {api.EventQuery{Since: &since}, nil},
		"of a VM gone":   {api.EventQuery{VM: long.String()}, []string{"vm.console"}},
		"of no grant":    {api.EventQuery{Grant: uuid.NewString()}, nil},
		"with its topic": {api.EventQuery{Types: []string{"vm."}, VM: long.String()}, []string{"vm.console"}},
	} {
		if got := paths(c.q); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	for name, c := range map[string]struct {
		q    api.EventQuery
		says string
	}{
		"no type":           {api.EventQuery{Types: []string{"grant"}}, "no type of event"},
		"no actor":          {api.EventQuery{Actor: "root"}, "is no actor"},
		"no user":           {api.EventQuery{Actor: "uid:x"}, "not the number of a user"},
		"no VM":             {api.EventQuery{Actor: "vm:nobody"}, "no VM"},
		"a type without":    {api.EventQuery{Decision: "deny", Types: []string{"vm.started"}}, "record a decision"},
		"half a grant's id": {api.EventQuery{Grant: "dddddddd"}, "no grant"},
	} {
		if _, err := g.Events(t.Context(), c.q); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
	if policy.Error != policy.Outcome(api.OutcomeError) {
		t.Error("policy and the API differ on how an error is called")
	}
}

// TestVerifyOverTheAPI verifies a live ledger, from anchors too.
func TestVerifyOverTheAPI(t *testing.T) {
	a := newAuditing(t)
	a.record(20)
	seq, head := a.ledger.Head()
	events, err := a.ledger.Events(9, ledger.EventFilter{}, 1)
	if err != nil {
		t.Fatal(err)
	}
	tenth := api.Anchor{Seq: 10, Hash: events[0].Hash.String()}
	r, err := a.client.VerifyAudit(t.Context(), api.VerifyQuery{Anchors: []api.Anchor{{Seq: seq, Hash: head.String()}, tenth}, FromAnchor: true})
	if err != nil || r.Broken != nil || r.First != 10 || r.Last != seq || r.Events != int(seq)-9 || r.Head != head.String() || r.Anchors != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	tenth.Seq = 11
	for _, from := range []bool{false, true} {
		r, err := a.client.VerifyAudit(t.Context(), api.VerifyQuery{Anchors: []api.Anchor{tenth}, FromAnchor: from})
		if err != nil || r.Broken == nil || r.Broken.Seq != 11 || !strings.HasPrefix(r.Broken.Problem, "anchor") {
			t.Errorf("an anchor that is not part of it: %+v, %v", r, err)
		}
	}
	for query, says := range map[string]string{
		"anchor=10": "64 hexadecimal digits", "anchor=x%3A" + head.String(): "64 hexadecimal digits", "from_anchor=true": "needs an anchor",
	} {
		conn, err := net.Dial("unix", a.socket)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = fmt.Fprintf(conn, "GET /v1/audit/verify?%s HTTP/1.0\r\nHost: broker\r\n\r\n", query)
		answer, _ := io.ReadAll(conn)
		_ = conn.Close()
		if !strings.HasPrefix(string(answer), "HTTP/1.0 400") || !strings.Contains(string(answer), says) {
			t.Errorf("%s: %s", query, answer)
		}
	}
}
