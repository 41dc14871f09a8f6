package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// Options are what a [Reconciler] works with.
type Options struct {
	Appliers []Applier
	Ledger   Ledger
	Clock    clock.Clock
	// Instances returns the current run of every VM that can be given
	// something now.
	Instances func() map[uuid.UUID]string
	Log       *slog.Logger
	Meter     Meter // may be nil
	// Sweep is how often each VM is looked at without a wake-up. Default 10 s.
	Sweep time.Duration
	// ObserveTimeout bounds one look at the world. Default 15 s.
	ObserveTimeout time.Duration
	// ApplyTimeout bounds one application, after which it is tried again.
	// Default 60 s.
	ApplyTimeout time.Duration
	// WithdrawTimeout bounds the wait for one withdrawal, after which it is
	// tried again. Default 30 s.
	WithdrawTimeout time.Duration
	// Patience is how long an application may keep others of its VM and kind from
	// beginning. Default 5 s.
	Patience time.Duration
	// Begin is closed once appliers can tell what exists: until then nothing is
	// made, and of nothing is it said that it is gone. Nil: they can.
	Begin <-chan struct{}
}

// Reconciler holds, for each VM that it was woken for and each kind, a pair of
// lanes.
type Reconciler struct {
	o        Options
	kinds    map[string]Kind
	appliers map[string]Applier
	ctx      context.Context //nolint:containedctx // the lifetime of its goroutines, not of a call
	stop     context.CancelFunc
	wg       sync.WaitGroup

	mu       sync.Mutex
	lanes    map[corner]*lanes
	failures map[uuid.UUID]error
	missed   map[string]bool  // objects that are there and that no agent took up
	caughtUp map[string]bool  // objects that an agent took up later than their grants say
	seen     map[string]sight // where an object was last there
	// moments counts looks and applications that ended; made has, by object, when
	// the last one ended.
	moments uint64
	made    map[string]uint64
	// By object id: what is being made and what is being taken away, and what
	// failed and waits before it is tried again.
	applying  map[string]*application
	extending map[string]uint64 // the generations that are being told to objects
	cutting   map[string]*cutting
	busy      map[corner]int // how much is being taken away
	troubles  map[string]*trouble
	// cut holds what was taken from grants whose end is not yet on record.
	cut  map[uuid.UUID]map[share]cutShare // by VM
	gone map[corner]*rounds               // looks at who has nothing left
	// floors are, by object id, the generations below which nothing is made any
	// more, though no grant is left that says so.
	floors map[string]uint64
	barred map[uuid.UUID]bool // grants that give nothing, whatever the ledger says
	// needed are, by VM, those that have objects which need it, and runs the runs
	// in which they were last woken for it.
	needed map[uuid.UUID]map[corner]bool
	runs   map[uuid.UUID]string
}

// corner is the part of the world that a pair of lanes owns: the objects of one
// kind in one VM. No corner waits for another.
type corner struct {
	vm   uuid.UUID
	kind string
}

type lanes struct {
	cut, apply chan struct{}
	// slots bounds how many objects are made at once. Withdrawals know no such
	// bound.
	slots chan struct{}
}

// applyWidth is how many objects of one kind are made at once in a VM.
const applyWidth = 4

// sight is where an object was last seen to be there.
type sight struct {
	run        string
	generation uint64
}

// New returns a reconciler that runs until Close.
func New(o Options) *Reconciler {
	for _, d := range []struct {
		v         *time.Duration
		otherwise time.Duration
	}{
		{&o.Sweep, 10 * time.Second},
		{&o.ObserveTimeout, 15 * time.Second},
		{&o.ApplyTimeout, time.Minute},
		{&o.WithdrawTimeout, 30 * time.Second},
		{&o.Patience, 5 * time.Second},
	} {
		if *d.v == 0 {
			*d.v = d.otherwise
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Meter == nil {
		o.Meter = noMeter{}
	}
	r := &Reconciler{
		o: o, kinds: map[string]Kind{}, appliers: map[string]Applier{},
		lanes: map[corner]*lanes{}, failures: map[uuid.UUID]error{}, missed: map[string]bool{}, caughtUp: map[string]bool{}, seen: map[string]sight{}, made: map[string]uint64{},
		applying: map[string]*application{}, extending: map[string]uint64{}, cutting: map[string]*cutting{}, gone: map[corner]*rounds{}, troubles: map[string]*trouble{},
		cut: map[uuid.UUID]map[share]cutShare{}, busy: map[corner]int{}, floors: map[string]uint64{}, barred: map[uuid.UUID]bool{},
		needed: map[uuid.UUID]map[corner]bool{}, runs: map[uuid.UUID]string{},
	}
	for _, a := range o.Appliers {
		r.kinds[a.Kind()], r.appliers[a.Kind()] = a, a
	}
	r.ctx, r.stop = context.WithCancel(context.Background())
	return r
}

// Close ends all lanes and withdrawals and waits for them. What they had begun is finished by
// the next reconciler.
func (r *Reconciler) Close() {
	r.stop()
	r.wg.Wait()
}

// Knows tells whether an applier exists for the capability kind.
func (r *Reconciler) Knows(kind string) bool { return r.appliers[kind] != nil }

// Wake says that something about the VM may have changed. It also wakes the VMs
// that have objects which need it, if another run of it began, or the last one
// ended.
func (r *Reconciler) Wake(vm uuid.UUID) {
	if r.ctx.Err() != nil {
		return
	}
	for kind := range r.appliers {
		r.wake(corner{vm, kind})
	}
	r.mu.Lock()
	some := len(r.needed[vm]) > 0
	r.mu.Unlock()
	if !some {
		return
	}
	run := r.o.Instances()[vm]
	r.mu.Lock()
	var who []corner
	if last, known := r.runs[vm]; !known || last != run {
		for c := range r.needed[vm] {
			who = append(who, c)
		}
	}
	r.runs[vm] = run
	r.mu.Unlock()
	for _, c := range who {
		r.wake(c)
	}
}

func (r *Reconciler) wake(c corner) {
	l := r.laneOf(c)
	poke(l.cut)
	poke(l.apply)
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // one wake-up waits already, and the pass it causes sees all
	}
}

// laneOf are the lanes of a corner, which run from the first call on.
func (r *Reconciler) laneOf(c corner) *lanes {
	r.mu.Lock()
	defer r.mu.Unlock()
	l, ok := r.lanes[c]
	if !ok {
		l = &lanes{make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{}, applyWidth)}
		r.lanes[c] = l
		// One sweep is enough for both: the first lane wakes the second where
		// there is something to make.
		r.lane(c, "withdraw", l.cut, r.o.Sweep, r.cutPass)
		r.lane(c, "apply", l.apply, 0, r.applyPass)
	}
	return l
}

// lane runs pass for one corner whenever it is woken, or the sweep is due; a
// sweep of zero is never. A pass that fails is tried again after a growing,
// jittered pause.
func (r *Reconciler) lane(c corner, name string, wake <-chan struct{}, sweep time.Duration, pass func(context.Context, corner) error) {
	if r.ctx.Err() != nil {
		return
	}
	r.wg.Go(func() {
		if r.o.Begin != nil {
			select {
			case <-r.o.Begin:
			case <-r.ctx.Done():
				return
			}
		}
		pause := time.Duration(0)
		wait := jittered(sweep, 8)
		for {
			var due <-chan time.Time
			timer := time.NewTimer(wait)
			if wait > 0 {
				due = timer.C
			}
			select {
			case <-r.ctx.Done():
				timer.Stop()
				return
			case <-wake:
			case <-due:
			}
			timer.Stop()
			began := time.Now()
			err := pass(r.ctx, c)
			if r.ctx.Err() != nil {
				return
			}
			r.o.Meter.Passed(name, time.Since(began))
			if err == nil {
				pause, wait = 0, jittered(sweep, 8)
				continue
			}
			level := slog.LevelWarn
			if errors.Is(err, ErrNotNow) {
				level = slog.LevelDebug // its next run, or its end, wakes the lanes
			}
			pause = next(pause)
			wait = jittered(pause, 2)
			r.o.Log.Log(r.ctx, level, "cannot reconcile yet", "vm", c.vm, "kind", c.kind, "lane", name, "err", err, "again_in", wait)
		}
	})
}

// What failed is tried again after so long, and each time after twice as long.
const firstPause, longestPause = 50 * time.Millisecond, 10 * time.Second

func next(pause time.Duration) time.Duration { return min(max(2*pause, firstPause), longestPause) }

// jittered is d and up to one part more, so that what began together does not
// come again together.
func jittered(d time.Duration, parts int64) time.Duration {
	if part := int64(d) / parts; part > 0 {
		d += time.Duration(rand.Int64N(part))
	}
	return d
}

// Check says why a capability cannot be applied, if that can be told.
func (r *Reconciler) Check(ctx context.Context, c capabilities.Capability) error {
	if checker, ok := r.appliers[c.Kind].(Checker); ok {
		return checker.Check(ctx, c)
	}
	return nil
}

// ObjectsOf are the objects that a grant needs, whatever its state.
func (r *Reconciler) ObjectsOf(g ledger.Grant) []Object {
	if k := r.kinds[g.Capability.Kind]; k != nil {
		return k.Objects(g)
	}
	return nil
}

// Sight is what exists in a VM, by object id.
func (r *Reconciler) Sight(ctx context.Context, vm uuid.UUID) (map[string]Observed, error) {
	out := map[string]Observed{}
	for _, a := range r.o.Appliers {
		seen, err := a.Observe(ctx, vm)
		if err != nil {
			return nil, err
		}
		for _, o := range seen {
			out[o.ID] = o
		}
	}
	return out, nil
}

// Failure is why a grant that failed did, with the error's type, while this
// process remembers it.
func (r *Reconciler) Failure(grant uuid.UUID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failures[grant]
}

func (r *Reconciler) remember(g uuid.UUID, err error) {
	const most = 1024
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.failures) >= most {
		clear(r.failures)
	}
	r.failures[g] = err
}

// append records events, leaving out those that another one has overtaken.
func (r *Reconciler) append(ctx context.Context, events []ledger.Event) error {
	if len(events) == 0 {
		return nil
	}
	recorded, err := r.o.Ledger.Update(ctx, func(tx *ledger.Tx) error {
		for _, e := range events {
			// No move, so that it is legal twice, and after the grant's end.
			if g, _ := tx.State().Grant(e.Grant); e.Type == ledger.GrantDegraded && (g.Degraded != "" || g.State.Final()) {
				continue
			}
			if err := tx.Append(e); err != nil && !errors.Is(err, ledger.ErrIllegalMove) {
				return err
			}
		}
		return nil
	})
	r.WakeHeirs(recorded)
	return err
}

func change(t ledger.EventType, grant uuid.UUID, reason string) ledger.Event {
	return ledger.NewChange(t, ledger.Actor{Kind: ledger.ActorBroker}, grant, ledger.Change{Reason: reason})
}

// Settled tells whether nothing is left to do for the VM: nothing to take away
// and no grant between two states. A grant that waits, for a VM to run or before
// it is tried again, is settled.
func (r *Reconciler) Settled(ctx context.Context, vm uuid.UUID) (bool, error) {
	for kind := range r.appliers {
		c := corner{vm, kind}
		if r.quiet(c) {
			idle, err := r.idle(ctx, c)
			if err != nil {
				return false, err
			}
			if idle {
				continue
			}
		}
		v, err := r.look(ctx, c)
		if err != nil {
			return false, err
		}
		if r.takes(c) || slices.ContainsFunc(v.plan, func(a Action) bool { return a.Verb.Cuts() }) {
			return false, nil
		}
		waits := map[string]bool{} // objects
		for _, a := range v.plan {
			if a.Verb == Wait {
				waits[a.Object.ID] = true
			}
		}
		for _, g := range v.grants {
			if g.State == ledger.Revoking || g.State == ledger.Pending && !r.waits(v, waits, g) {
				return false, nil
			}
		}
	}
	return true, nil
}

// waits tells whether a pending grant can become nothing else just now.
func (r *Reconciler) waits(v view, objects map[string]bool, g ledger.Grant) bool {
	if _, running := v.instances[g.Holder]; !running {
		return true
	}
	return slices.ContainsFunc(r.ObjectsOf(g), func(o Object) bool {
		_, troubled := r.TroubleOf(o.ID)
		return troubled || objects[o.ID]
	})
}
