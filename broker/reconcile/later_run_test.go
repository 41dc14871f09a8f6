package reconcile

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

// runs is a place of one VM whose objects belong to a run: where there is none
// nothing can be made, nothing is to be withdrawn, and nothing is remembered.
type runs struct {
	place
	mu  sync.Mutex
	now string
	// slow holds up who has seen what it is given.
	slow func([]Observed)
}

func (p *runs) Observe(ctx context.Context, vm uuid.UUID) ([]Observed, error) {
	seen, err := p.place.Observe(ctx, vm)
	p.mu.Lock()
	slow := p.slow
	p.mu.Unlock()
	if slow != nil {
		slow(seen)
	}
	return seen, err
}

func (p *runs) run() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now
}

// begin ends the present run, if there is one, and begins another.
func (p *runs) begin(run string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now = run
	p.place.mu.Lock()
	defer p.place.mu.Unlock()
	p.objects, p.barred = map[string]Observed{}, map[string]uint64{}
}

func (p *runs) Run(context.Context, uuid.UUID) (string, error) { return p.run(), nil }

func (p *runs) Objects(g ledger.Grant) []Object {
	o := p.place.Objects(g)
	if g.Persist {
		o[0].Instance = ""
	}
	return o
}

func (p *runs) Apply(ctx context.Context, o Object) (string, error) {
	if run := p.run(); run == "" || run != o.Instance {
		return "", ErrNotNow
	}
	return p.place.Apply(ctx, o)
}

func (p *runs) Withdraw(ctx context.Context, o Object) (string, error) {
	if p.run() == "" {
		return "", nil
	}
	return p.place.Withdraw(ctx, o)
}

func newRunsRig(t *testing.T, look func(run string) string) (*rig, *runs) {
	g := newRig(t)
	g.r.Close()
	p := &runs{now: "run"}
	p.objects, p.barred = map[string]Observed{}, map[string]uint64{}
	g.p = &p.place
	g.r = New(Options{
		Appliers: []Applier{p}, Ledger: g.l, Clock: g.clock, Sweep: 20 * time.Millisecond,
		Instances: func() map[uuid.UUID]string {
			run := p.run()
			if look != nil {
				run = look(run)
			}
			if run == "" {
				return nil
			}
			return map[uuid.UUID]string{g.vm: run}
		},
	})
	return g, p
}

func persists(r *ledger.GrantRecord) { r.Persist = true }

// awaitObject waits until the VM has something.
func (g *rig) awaitObject() {
	g.t.Helper()
	for end := time.Now().Add(10 * time.Second); g.p.count() == 0; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			g.t.Fatal("the VM's run does not get it")
		}
	}
}

// lose is the end of all objects that nobody took away.
func (g *rig) lose() {
	g.p.mu.Lock()
	clear(g.p.objects)
	g.p.mu.Unlock()
	g.r.Wake(g.vm)
}

// wantLost awaits the end of a grant whose object was lost, and says if the
// guest was given it back meanwhile.
func (g *rig) wantLost(id uuid.UUID, applied int) {
	g.t.Helper()
	g.await(id, ledger.Revoked)
	events, err := g.l.Events(0, ledger.EventFilter{Grant: id, Types: []ledger.EventType{ledger.GrantRevoking}}, 0)
	if err != nil {
		g.t.Fatal(err)
	}
	const reason = "its object in the VM is gone: what served it has ended"
	if len(events) != 1 || !strings.Contains(string(events[0].Data), reason) {
		g.t.Errorf("recorded were %+v, want one with the reason %q", events, reason)
	}
	if n := g.p.applied(); n != applied {
		g.t.Errorf("it was made %d times, want %d: the guest got back what it lost", n, applied)
	}
}

// What a guest had and lost is not given back to it in the same run, also where
// the grant came into being in an earlier one.
func TestLostInALaterRun(t *testing.T) {
	g, p := newRunsRig(t, nil)
	id := g.grant(persists)
	g.await(id, ledger.Active)
	p.begin("run-2")
	g.r.Wake(g.vm)
	g.awaitObject()
	g.lose()
	g.wantLost(id, 2)
}

// The same where another reconciler had made it in this run.
func TestLostInALaterRunAfterARestart(t *testing.T) {
	g, p := newRunsRig(t, nil)
	id := g.grant(persists)
	g.await(id, ledger.Active)
	p.begin("run-2")
	g.r.Wake(g.vm)
	g.awaitObject()
	g.r.Close()
	g.r = New(g.r.o)
	if _, err := g.r.Settled(t.Context(), g.vm); err != nil { // it looks
		t.Fatal(err)
	}
	g.lose()
	g.wantLost(id, 2)
}

// What an object was in an earlier run says nothing of a later one: it is made
// again as often as the VM runs.
func TestPersistsFromRunToRun(t *testing.T) {
	g, p := newRunsRig(t, nil)
	id := g.grant(persists)
	g.await(id, ledger.Active)
	for i := range 5 {
		p.begin(fmt.Sprint("run-", i))
		g.r.Wake(g.vm)
		g.awaitObject()
		if _, err := g.r.Settled(t.Context(), g.vm); err != nil {
			t.Fatal(err)
		}
		g.await(id, ledger.Active)
	}
	if n := p.applied(); n != 6 {
		t.Errorf("it was made %d times in 6 runs", n)
	}
}

// Who has yet to learn of a VM's next run does not take what went with the last
// one for lost in it.
func TestRunEndsUnnoticed(t *testing.T) {
	var mu sync.Mutex
	known := "run"
	g, p := newRunsRig(t, func(string) string {
		mu.Lock()
		defer mu.Unlock()
		return known
	})
	id := g.grant(persists)
	g.await(id, ledger.Active)
	p.begin("run-2")
	for _, now := range []string{"run", "run-2"} {
		mu.Lock()
		known = now
		mu.Unlock()
		if _, err := g.r.Settled(t.Context(), g.vm); err != nil {
			t.Fatal(err)
		}
		if plan, err := g.r.Preview(t.Context(), g.vm); err != nil || len(plan) == 0 && g.p.count() == 0 {
			t.Errorf("known is %s: the plan is %v, %v; want that it gets it", now, plan, err)
		}
	}
	g.awaitObject()
	g.await(id, ledger.Active)
}

// Who looked at the world before something was made there does not take it for
// lost.
func TestMadeAfterALook(t *testing.T) {
	g, p := newRunsRig(t, nil)
	id := g.grant(persists)
	g.await(id, ledger.Active)
	var once sync.Once
	looked, again := make(chan struct{}), make(chan struct{})
	made := func() bool {
		g.r.mu.Lock()
		defer g.r.mu.Unlock()
		return g.r.seen["o-"+id.String()].run == "run-2"
	}
	p.mu.Lock()
	p.slow = func(seen []Observed) {
		switch {
		case calledBy("applyPass") && len(seen) == 0:
			<-looked
		case calledBy("cutPass") && isClosed(looked): // so that the pass before has ended
			once.Do(func() { close(again) })
		case calledBy("cutPass") && len(seen) == 0:
			for close(looked); !made(); time.Sleep(time.Millisecond) {
				if g.r.ctx.Err() != nil {
					return
				}
			}
		}
	}
	p.mu.Unlock()
	p.begin("run-2")
	g.r.Wake(g.vm)
	select {
	case <-again:
	case <-time.After(10 * time.Second):
		t.Fatal("nobody looks")
	}
	events, err := g.l.Events(0, ledger.EventFilter{Grant: id, Types: []ledger.EventType{ledger.GrantRevoking}}, 0)
	if err != nil || len(events) != 0 {
		t.Errorf("recorded were %+v, %v; want nothing", events, err)
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// A VM starts while a grant that persists is revoked: a look at the ledger from
// before that must not meet a run from after it.
func TestPlanMeetsNoLaterRun(t *testing.T) {
	var g *rig
	var p *runs
	var id uuid.UUID
	g, p = newRunsRig(t, func(run string) string {
		if !calledBy("TestPlanMeetsNoLaterRun") {
			return run
		}
		g.revoke(id)
		g.await(id, ledger.Revoked)
		p.begin("run-2")
		return "run-2"
	})
	id = g.grant(persists)
	g.await(id, ledger.Active)
	p.begin("")
	plan, err := g.r.Preview(t.Context(), g.vm)
	if err != nil || len(plan) != 0 {
		t.Errorf("the plan is %v, %v; want nothing", plan, err)
	}
}

// The same, and whatever the plan says.
func TestRevokedWhileTheVMStarts(t *testing.T) {
	var g *rig
	var p *runs
	var id uuid.UUID
	armed, done, passed := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var once, next sync.Once
	g, p = newRunsRig(t, func(run string) string {
		if !isClosed(armed) || !calledBy("applyPass") {
			return run
		}
		if isClosed(done) { // the next pass, so that the one before has ended
			next.Do(func() { close(passed) })
		}
		once.Do(func() {
			g.revoke(id)
			g.await(id, ledger.Revoked)
			p.begin("run-2")
			close(done)
		})
		return p.run()
	})
	id = g.grant(persists)
	g.await(id, ledger.Active)
	// What is barred keeps every VM from being idle.
	g.r.mu.Lock()
	g.r.barred[uuid.New()] = true
	g.r.mu.Unlock()
	p.begin("")
	close(armed)
	g.r.Wake(g.vm)
	select {
	case <-passed:
	case <-time.After(20 * time.Second):
		t.Fatal("nobody looks")
	}
	if n := p.applied(); n != 1 {
		t.Errorf("it was made %d times: once more although its grant is revoked", n)
	}
}

// calledBy tells whether a function is on the stack.
func calledBy(name string) bool {
	pcs := make([]uintptr, 32)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs)])
	for {
		f, more := frames.Next()
		if strings.HasSuffix(f.Function, "."+name) {
			return true
		}
		if !more {
			return false
		}
	}
}
