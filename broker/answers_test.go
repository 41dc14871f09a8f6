package broker

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/policy"
)

// Policies see the time on the host's wall, as their library reads it.
func TestPoliciesSeeTheHostsTime(t *testing.T) {
	local := time.Local
	t.Cleanup(func() { time.Local = local }) // after the broker's own end, which reads it
	time.Local = time.FixedZone("", -5*3600)
	at := time.Date(2026, 11, 28, 3, 4, 5, 6, time.UTC)
	if got, err := json.Marshal(hostTime(at)); err != nil || string(got) != `"2026-11-27T22:04:05-05:00"` {
		t.Errorf("policies see %s, %v", got, err)
	}
	// The same through a worker: it is always this hour where the host is.
	now := time.Now().In(time.Local)
	from, to := now.Add(-time.Hour).Format("15:04"), now.Add(time.Hour).Format("15:04")
	g := newGranting(t, allowsAll, fmt.Sprintf(`package spectrum.grant

import data.spectrum.lib.clock

allow if clock.between(input.now, %q, %q)
`, from, to))
	g.granted(mail1, "/docs")
}

// Whoever reaches into a resource is found: who may do more, who has what is
// above it, and who has what is beneath.
func TestGrantsOnAResource(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	writes := func(r *request) {
		c, err := g.kinds.Parse("fs:rw:"+workID.String()+":"+r.capability.Resource.String()[len(workID.String())+1:], nil)
		if err != nil {
			t.Fatal(err)
		}
		r.capability = c
	}
	want := []uuid.UUID{g.granted(mail1, "/docs", writes).ID, g.granted(mail1, "/").ID, g.granted(mail1, "/docs/a/b").ID}
	g.granted(mail1, "/other")
	g.granted(mail2, "/docs") // another partition's
	listed, err := g.ListGrants(t.Context(), api.GrantFilter{Resource: "fs:ro:" + workID.String() + ":/docs"})
	if err != nil {
		t.Fatal(err)
	}
	var got []uuid.UUID
	for _, x := range listed {
		got = append(got, x.ID)
	}
	if !slices.Equal(got, want) {
		t.Errorf("listed are %v, want %v", got, want)
	}
	done, err := g.Revoke(t.Context(), api.Caller{Kind: api.CallerPerson}, api.RevokeRequest{Resource: "fs:ro:" + workID.String() + ":/docs", Wait: true})
	if err != nil || len(done.Revoked) != 3 || len(done.Revoking) != 0 {
		t.Errorf("revoked are %d, revoking %d, %v; want 3 and none", len(done.Revoked), len(done.Revoking), err)
	}
}

// A caller who does not wait for the answer revokes all the same, and learns
// nothing wrong about the ledger.
func TestRevocationOutlivesItsCaller(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	id := g.granted(mail1, "/docs").ID
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	got, err := g.revoke(ctx, brokerActor, only(id), "test", true)
	if err != nil || len(got.revoked)+len(got.revoking) != 1 {
		t.Errorf("revoked %d, revoking %d, %v", len(got.revoked), len(got.revoking), err)
	}
	g.awaitState(id, ledger.Revoked)
}

// A policy cannot keep its refusals off the record by saying too much, nor fill
// the ledger with them.
func TestVerbosePolicyIsRecorded(t *testing.T) {
	var rules strings.Builder
	for n := range 95 {
		fmt.Fprintf(&rules, "deny contains %q\n\n", fmt.Sprint(n, strings.Repeat("<", 1900)))
	}
	g := newGranting(t, allowsAll, "package spectrum.grant\n\n"+rules.String())
	_, err := g.grant(t.Context(), g.asks(mail1, "/docs"))
	if api.CodeOf(err) != api.CodeDenied {
		t.Fatalf("it is answered %v", err)
	}
	on := g.events(ledger.GrantDenied)
	if len(on) != 1 {
		t.Fatalf("%d refusals are on record, want 1", len(on))
	}
	if n := len(on[0].Data); n > 64<<10 {
		t.Errorf("the refusal takes %d bytes", n)
	}
	if !strings.Contains(string(on[0].Data), "and 87 more") {
		t.Errorf("it does not say that there is more: %.300s", on[0].Data)
	}
}

// A policy that takes its time to load delays those who ask it, and nobody else.
func TestSlowFirstLoadDelaysOnlyItsOwn(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	work := policy.PartitionEngine(workID)
	g.firstLoads = map[policy.EngineID]chan struct{}{work: make(chan struct{})}
	g.granted(mail2, "/docs")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, _ = g.grant(ctx, g.asks(mail1, "/docs"))
	if took := time.Since(began); took < 200*time.Millisecond {
		t.Errorf("a request did not wait for its engine: %v", took)
	}
	go g.firstLoaded(work)
	g.granted(mail1, "/docs")
}

// ahead is a clock whose wall time runs ahead.
type ahead struct {
	clock.Clock
	by time.Duration
}

func (a ahead) Now() capabilities.Instant {
	now := a.Clock.Now()
	now.Wall = now.Wall.Add(a.by)
	return now
}

// Without leases the ledger does not grow while nothing happens.
func TestIdleLedgerDoesNotGrow(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	g.granted(mail1, "/docs")
	before, _ := g.ledger.Head()
	g.o.Clock = ahead{g.o.Clock, time.Hour}
	g.wg.Go(func() { g.keepTime(g.ctx) })
	time.Sleep(300 * time.Millisecond)
	if after, _ := g.ledger.Head(); after != before {
		t.Errorf("%d events were written: %v", after-before, g.events(ledger.ClockHighwater))
	}
	ttl := int64(7 * 24 * 3600)
	g.granted(mail1, "/leased", func(r *request) { r.ttl = &ttl })
	for end := time.Now().Add(10 * time.Second); len(g.events(ledger.ClockHighwater)) == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("beside a lease the time is not marked")
		}
	}
}
