package reconcile

import (
	"context"
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

// What a guest had and lost is not given back to it in the same run, also where
// the grant came into being in an earlier one.
func TestLostInALaterRun(t *testing.T) {
	g, p := newRunsRig(t, nil)
	id := g.grant(persists)
	g.await(id, ledger.Active)
	p.begin("run-2")
	g.r.Wake(g.vm)
	seen := func() bool {
		g.r.mu.Lock()
		defer g.r.mu.Unlock()
		return g.r.seen["o-"+id.String()] == "run-2"
	}
	for end := time.Now().Add(10 * time.Second); !seen(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nobody sees that the next run has it")
		}
	}
	g.p.mu.Lock()
	clear(g.p.objects)
	g.p.mu.Unlock()
	g.r.Wake(g.vm)
	if got := g.await(id, ledger.Revoked); !strings.Contains(got.Reason, "its object in the VM is gone") {
		t.Errorf("it ended because %q", got.Reason)
	}
	if n := g.p.count(); n != 0 {
		t.Errorf("the guest got back what it lost")
	}
}

// A VM starts while a grant that persists is revoked: a look at the ledger from
// before that must not meet a run from after it.
func TestRevokedWhileTheVMStarts(t *testing.T) {
	var g *rig
	var p *runs
	var id uuid.UUID
	armed, done := make(chan struct{}), make(chan struct{})
	var once sync.Once
	g, p = newRunsRig(t, func(run string) string {
		select {
		case <-armed:
		default:
			return run
		}
		if !inApplyPass() {
			return run
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
	p.begin("")
	close(armed)
	g.r.Wake(g.vm)
	<-done
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		g.p.mu.Lock()
		for _, o := range g.p.objects {
			t.Errorf("%+v exists although its grant is revoked", o)
			end = time.Now()
		}
		g.p.mu.Unlock()
	}
}

func inApplyPass() bool {
	pcs := make([]uintptr, 32)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs)])
	for {
		f, more := frames.Next()
		if strings.HasSuffix(f.Function, "applyPass") {
			return true
		}
		if !more {
			return false
		}
	}
}
