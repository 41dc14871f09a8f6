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
	"golang.org/x/sync/errgroup"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/failpoint"
)

// Applier makes the objects of one kind exist or not, and says which exist.
// All methods may be called at once.
type Applier interface {
	Kind
	// Observe returns the objects of this kind in one VM. An object that it
	// does not return does not exist, so it fails rather than guess.
	Observe(ctx context.Context, vm uuid.UUID) ([]Observed, error)
	// Apply returns when the object is there, with a note for people or "". It
	// fails with [ErrNotNow] where the VM's run ended, or has yet to begin.
	Apply(ctx context.Context, o Object) (note string, err error)
	// Withdraw returns when nothing of the object gives access any more, and
	// makes sure that an Apply of an older generation fails from then on. The
	// note says what had to be done by force, or is "".
	Withdraw(ctx context.Context, o Object) (note string, err error)
}

// ErrNotNow says that an application found no run of the VM to apply to. It
// speaks against no grant: those tied to the run end with it, and any other
// waits for the next one.
var ErrNotNow = errors.New("the VM does not run just now")

// Checker is an [Applier] that can tell before there is a grant that a
// capability cannot be applied.
type Checker interface {
	Check(ctx context.Context, c capabilities.Capability) error
}

// AgentFollower is an [Applier] that has a VM's agent do something for each
// object, and asks again when an agent comes back.
type AgentFollower interface {
	// AgentBack fails with [ErrNotNow] where the agent was not asked.
	AgentBack(ctx context.Context, o Object) error
}

// RunTeller is an [Applier] that knows the present run of a VM from the world,
// behind which Options.Instances may be.
type RunTeller interface {
	Run(ctx context.Context, vm uuid.UUID) (instance string, err error)
}

// Placer is an [Applier] whose objects have a place inside the VM.
type Placer interface {
	// Place is where the VM finds what was granted, or "".
	Place(g ledger.Grant) string
}

// Ledger is what the reconciler needs of the ledger.
type Ledger interface {
	View(fn func(s *ledger.State))
	Update(ctx context.Context, fn func(tx *ledger.Tx) error) ([]ledger.Event, error)
}

// Options are what a [Reconciler] works with.
type Options struct {
	Appliers []Applier
	Ledger   Ledger
	Clock    clock.Clock
	// Instances returns the current run of every VM that can be given
	// something now.
	Instances func() map[uuid.UUID]string
	Log       *slog.Logger
	// Sweep is how often each VM is looked at without a wake-up. Default 10 s.
	Sweep time.Duration
	// ApplyTimeout bounds one application. Default 60 s.
	ApplyTimeout time.Duration
	// WithdrawTimeout bounds the wait for one withdrawal, after which it is
	// tried again. Default 30 s.
	WithdrawTimeout time.Duration
}

// Reconciler holds one pair of lanes for each VM it was woken for.
type Reconciler struct {
	o        Options
	kinds    map[string]Kind
	appliers map[string]Applier
	ctx      context.Context //nolint:containedctx // the lifetime of its goroutines, not of a call
	stop     context.CancelFunc
	wg       sync.WaitGroup

	mu        sync.Mutex
	vms       map[uuid.UUID]*lanes
	failures  map[uuid.UUID]error
	missed    map[string]bool   // objects that are there and that no agent took up
	caughtUp  map[string]bool   // objects that an agent took up later than their grants say
	seen      map[string]string // the run in which an object was last there
	applying  map[string]application
	extending map[string]uint64 // the generations that are being told to objects
	// By object id: withdrawals under way, the pause after the next failure of
	// one, and the generations that were withdrawn of objects whose grants are
	// not yet on record as revoked.
	withdrawing map[string]*withdrawal
	pauses      map[string]time.Duration
	cut         map[string]cutObject
	barred      map[uuid.UUID]bool // grants that give nothing, whatever the ledger says
}

type lanes struct{ cut, apply chan struct{} }

// applyWidth is how many objects of one VM are made at once. Withdrawals know
// no such bound.
const applyWidth = 4

// A lane and a withdrawal that failed pause so long before they try again.
const firstPause, longestPause = 50 * time.Millisecond, 10 * time.Second

// New returns a reconciler that runs until Close.
func New(o Options) *Reconciler {
	if o.Sweep == 0 {
		o.Sweep = 10 * time.Second
	}
	if o.ApplyTimeout == 0 {
		o.ApplyTimeout = time.Minute
	}
	if o.WithdrawTimeout == 0 {
		o.WithdrawTimeout = 30 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	r := &Reconciler{
		o: o, kinds: map[string]Kind{}, appliers: map[string]Applier{},
		vms: map[uuid.UUID]*lanes{}, failures: map[uuid.UUID]error{}, missed: map[string]bool{}, caughtUp: map[string]bool{}, seen: map[string]string{}, applying: map[string]application{},
		extending:   map[string]uint64{},
		withdrawing: map[string]*withdrawal{}, pauses: map[string]time.Duration{}, cut: map[string]cutObject{},
		barred: map[uuid.UUID]bool{},
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

// Wake says that something about the VM may have changed.
func (r *Reconciler) Wake(vm uuid.UUID) {
	if r.ctx.Err() != nil {
		return
	}
	r.mu.Lock()
	l, ok := r.vms[vm]
	if !ok {
		l = &lanes{make(chan struct{}, 1), make(chan struct{}, 1)}
		r.vms[vm] = l
		r.lane(vm, "withdraw", l.cut, r.cutPass)
		r.lane(vm, "apply", l.apply, r.applyPass)
	}
	r.mu.Unlock()
	for _, c := range []chan struct{}{l.cut, l.apply} {
		select {
		case c <- struct{}{}:
		default: // one wake-up waits already, and the pass it causes sees all
		}
	}
}

// Check says why a capability cannot be applied, if that can be told.
func (r *Reconciler) Check(ctx context.Context, c capabilities.Capability) error {
	if checker, ok := r.appliers[c.Kind].(Checker); ok {
		return checker.Check(ctx, c)
	}
	return nil
}

// agentDid says whether an agent that was asked again took up an object.
func (r *Reconciler) agentDid(object string, took bool) {
	r.setMissed(object, !took)
	r.mu.Lock()
	defer r.mu.Unlock()
	if took {
		r.caughtUp[object] = true
	} else {
		delete(r.caughtUp, object)
	}
}

// Reason is what there is to say of a grant: what is on record, unless that is
// that no agent took it up, and one has since.
func (r *Reconciler) Reason(g ledger.Grant) string {
	if g.State != ledger.Active || g.Reason == "" {
		return g.Reason
	}
	objects := r.ObjectsOf(g)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(objects) == 0 || slices.ContainsFunc(objects, func(o Object) bool { return !r.caughtUp[o.ID] }) {
		return g.Reason
	}
	return ""
}

// Place is where the VM finds what was granted, or "".
func (r *Reconciler) Place(g ledger.Grant) string {
	g.Reason = r.Reason(g)
	if placer, ok := r.appliers[g.Capability.Kind].(Placer); ok {
		return placer.Place(g)
	}
	return ""
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

// AgentAnswers says that the VM's agent answers; back, that it did not before.
// An agent that is back is asked for all objects, since it may have lost them,
// any other for those that it missed: it may have been replaced unseen.
func (r *Reconciler) AgentAnswers(ctx context.Context, vm uuid.UUID, back bool) {
	r.mu.Lock()
	some := len(r.missed) > 0
	r.mu.Unlock()
	if !back && !some {
		return
	}
	v, err := r.look(ctx, vm)
	if err != nil {
		r.o.Log.Warn("cannot tell a VM's agent what it missed", "vm", vm, "err", err)
		return
	}
	for _, o := range v.desired {
		follower, ok := r.appliers[o.Kind].(AgentFollower)
		there := slices.ContainsFunc(v.observed, func(seen Observed) bool { return seen.ID == o.ID && seen.Presence == Present })
		if !ok || !there || !back && !r.hasMissed(o.ID) {
			continue
		}
		err := follower.AgentBack(ctx, o)
		if !errors.Is(err, ErrNotNow) {
			r.agentDid(o.ID, err == nil)
		}
		if err != nil {
			r.o.Log.Warn("cannot tell a VM's agent what it missed", "vm", vm, "object", o.ID, "err", err)
		}
	}
}

// application is an Apply under way.
type application struct {
	generation uint64
	cancel     context.CancelFunc
}

// overtake ends what still waits for an object that was withdrawn, such as an
// agent's answer, which would hold up the VM's other grants.
func (r *Reconciler) overtake(o Object) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.missed, o.ID)
	delete(r.caughtUp, o.ID)
	delete(r.seen, o.ID)
	if a, ok := r.applying[o.ID]; ok && a.generation <= o.Generation {
		a.cancel()
	}
}

func (r *Reconciler) hasMissed(object string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.missed[object]
}

func (r *Reconciler) setMissed(object string, missed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if missed {
		r.missed[object] = true
	} else {
		delete(r.missed, object)
	}
}

// Failure is why a grant that failed did, with the error's type, while this
// process remembers it.
func (r *Reconciler) Failure(grant uuid.UUID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failures[grant]
}

// lane runs pass for one VM whenever it is woken, or the sweep is due. A pass
// that fails is tried again after a growing, jittered pause.
func (r *Reconciler) lane(vm uuid.UUID, name string, wake <-chan struct{}, pass func(context.Context, uuid.UUID) error) {
	r.wg.Go(func() {
		pause := firstPause
		wait := r.o.Sweep
		for {
			timer := time.NewTimer(wait)
			select {
			case <-r.ctx.Done():
				timer.Stop()
				return
			case <-wake:
			case <-timer.C:
			}
			timer.Stop()
			wait = r.o.Sweep
			if err := pass(r.ctx, vm); err != nil && r.ctx.Err() == nil {
				level := slog.LevelWarn
				if errors.Is(err, ErrNotNow) {
					level = slog.LevelDebug // its next run, or its end, wakes the lanes
				}
				r.o.Log.Log(r.ctx, level, "cannot reconcile yet", "vm", vm, "lane", name, "err", err, "again_in", pause)
				wait = pause + rand.N(pause/2)
				pause = min(2*pause, longestPause)
				continue
			}
			pause = firstPause
		}
	})
}

// Preview returns what the reconciler would do for the VM if extra were
// granted as well, and touches nothing.
func (r *Reconciler) Preview(ctx context.Context, vm uuid.UUID, extra ...ledger.Grant) ([]Action, error) {
	v, err := r.look(ctx, vm)
	if err != nil {
		return nil, err
	}
	more := Objects(r.kinds, extra, func(ledger.Grant) bool { return true })
	return Plan(append(v.desired, more...), v.ending, v.observed, v.instances, r.o.Clock.Now()), nil
}

// applyPass makes what live grants need.
func (r *Reconciler) applyPass(ctx context.Context, vm uuid.UUID) error {
	v, err := r.look(ctx, vm)
	if err != nil {
		return err
	}
	state := map[uuid.UUID]ledger.GrantState{}
	for _, g := range v.grants {
		state[g.ID] = g.State
	}
	// A grant whose object was already there when the broker stopped, before
	// it could say so, is applied again: that is how it learns the outcome.
	actions := append([]Action(nil), v.plan...)
	for _, d := range v.desired {
		planned := slices.ContainsFunc(v.plan, func(a Action) bool { return a.Object.ID == d.ID })
		present := slices.ContainsFunc(v.observed, func(o Observed) bool {
			return o.ID == d.ID && (o.Presence == Present || o.Presence == Arriving)
		})
		pending := slices.ContainsFunc(d.Owners, func(g uuid.UUID) bool { return state[g] == ledger.Pending })
		if present && pending && !planned {
			d.Instance = v.instances[vm]
			actions = append(actions, Action{Apply, d, "its grant is not confirmed"})
		}
	}
	var group errgroup.Group
	group.SetLimit(applyWidth)
	for _, a := range actions {
		if a.Verb != Apply {
			continue
		}
		group.Go(func() error { return r.apply(ctx, a, state) })
	}
	return group.Wait()
}

func (r *Reconciler) apply(ctx context.Context, a Action, state map[uuid.UUID]ledger.GrantState) error {
	applyCtx, cancel := context.WithTimeout(ctx, r.o.ApplyTimeout)
	defer cancel()
	r.mu.Lock()
	r.applying[a.Object.ID] = application{a.Object.Generation, cancel}
	r.mu.Unlock()
	// The plan may be minutes old. Who revokes from here on finds the application
	// and cancels it.
	live := false
	r.o.Ledger.View(func(s *ledger.State) {
		live = slices.ContainsFunc(a.Object.Owners, func(g uuid.UUID) bool { return r.Live(s, g) == nil })
	})
	if !live {
		r.mu.Lock()
		delete(r.applying, a.Object.ID)
		r.mu.Unlock()
		return nil
	}
	if live, err := r.charge(ctx, a.Object); err != nil || !live {
		r.mu.Lock()
		delete(r.applying, a.Object.ID)
		r.mu.Unlock()
		return err
	}
	failpoint.Hit("apply.before")
	note, err := r.appliers[a.Object.Kind].Apply(applyCtx, a.Object)
	failpoint.Hit("apply.after")
	r.mu.Lock()
	delete(r.applying, a.Object.ID)
	r.mu.Unlock()
	if ctx.Err() != nil {
		return nil // the broker stops; the next one finishes or undoes
	}
	if err == nil {
		r.mu.Lock()
		r.seen[a.Object.ID] = a.Object.Instance
		r.mu.Unlock()
		r.setMissed(a.Object.ID, note != "" && applyCtx.Err() == nil)
		r.o.Log.Info("applied", "object", a.Object.ID, "vm", a.Object.VM, "why", a.Why, "note", note)
	}
	if errors.Is(err, ErrNotNow) {
		r.o.Log.Debug("not applied yet", "object", a.Object.ID, "vm", a.Object.VM, "why", err)
		return nil
	}
	var moves []ledger.Event
	for _, g := range a.Object.Owners {
		switch {
		case err != nil && state[g] == ledger.Pending:
			r.remember(g, err)
			moves = append(moves, change(ledger.GrantFailed, g, err.Error()))
		case err != nil:
			moves = append(moves, change(ledger.GrantRevoking, g, err.Error()))
		case state[g] == ledger.Pending:
			moves = append(moves, ledger.NewChange(ledger.GrantActive, ledger.Actor{Kind: ledger.ActorBroker}, g,
				ledger.Change{Reason: note, Instance: a.Object.Instance}))
		}
	}
	if err != nil {
		r.o.Log.Warn("cannot apply", "object", a.Object.ID, "vm", a.Object.VM, "err", err)
		// Whatever was made of it before it failed has no owner now.
		defer r.Wake(a.Object.VM)
	}
	return r.append(ctx, moves)
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

// append records moves, leaving out those that another move has overtaken.
func (r *Reconciler) append(ctx context.Context, moves []ledger.Event) error {
	if len(moves) == 0 {
		return nil
	}
	events, err := r.o.Ledger.Update(ctx, func(tx *ledger.Tx) error {
		for _, e := range moves {
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
	r.WakeHeirs(events)
	return err
}

func change(t ledger.EventType, grant uuid.UUID, reason string) ledger.Event {
	return ledger.NewChange(t, ledger.Actor{Kind: ledger.ActorBroker}, grant, ledger.Change{Reason: reason})
}

// Settled tells whether nothing is left to do for the VM: no withdrawal and no
// grant between two states. A grant that waits for its VM to run is settled.
func (r *Reconciler) Settled(ctx context.Context, vm uuid.UUID) (bool, error) {
	v, err := r.look(ctx, vm)
	if err != nil {
		return false, err
	}
	if r.busy(vm) || slices.ContainsFunc(v.plan, func(a Action) bool { return a.Verb == Withdraw }) {
		return false, nil
	}
	_, running := r.o.Instances()[vm]
	return !slices.ContainsFunc(v.grants, func(g ledger.Grant) bool {
		return g.State == ledger.Revoking || (g.State == ledger.Pending && running)
	}), nil
}
