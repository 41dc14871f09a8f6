package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/applyfs"
	"spectrum-os.org/broker/broker/keys"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/failpoint"
	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/vmm/shim"
)

// brokerActor is the broker acting by itself.
var brokerActor = ledger.Actor{Kind: ledger.ActorBroker}

// Broker is the daemon. Run makes and ends it.
type Broker struct {
	o       Options
	log     *slog.Logger
	started time.Time

	kinds      *capabilities.Kinds
	ledger     *ledger.Ledger
	engines    *policy.Engines
	reconciler *reconcile.Reconciler
	keys       *keys.Ring
	metrics    *metrics

	inventory atomic.Pointer[inventory]
	ready     atomic.Bool
	strayed   atomic.Bool // the end of a run may be missing from the record
	// adopted is closed when all VMs that run are known: one that is not yet is
	// not one that has ended.
	adopted chan struct{}

	// ctx ends when the broker does; it is the lifetime of its goroutines.
	ctx context.Context //nolint:containedctx // see above
	wg  sync.WaitGroup

	loading      sync.Mutex   // held while policies are loaded
	reopening    sync.RWMutex // held while the ledger is reopened
	mu           sync.Mutex
	running      map[uuid.UUID]*unit // nil: being started
	policyErrors map[policy.EngineID]string
	// firstLoads are the engines whose first policy is still being loaded.
	firstLoads  map[policy.EngineID]chan struct{}
	policyFiles map[policy.EngineID][]string // of the revision in force
	unrecorded  map[uuid.UUID]tombstone
	barredKeys  map[string]keyTombstone
	labels      map[labelKey]bool // taken by grants that are being decided

	quotas quotas
}

// Wiring is what a broker is made of that differs between builds: the kinds of
// capability, and for each the applier that makes it true.
type Wiring struct {
	Kinds    []capabilities.Kind
	Appliers func(b *Broker) []reconcile.Applier
}

// FileApplier is the applier of file grants.
func FileApplier(b *Broker) reconcile.Applier {
	return applyfs.New(b, b.o.stretched(10*time.Second))
}

// Run runs a broker until ctx ends. VMs, and what was granted to them, run on.
func Run(ctx context.Context, o Options, w Wiring) (err error) {
	if err := o.defaults(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	b := &Broker{
		o: o, log: o.Log, started: time.Now(), ctx: ctx,
		kinds:   capabilities.NewKinds(w.Kinds...),
		quotas:  quotas{perMinute: o.GuestRequests, burst: o.GuestBurst},
		running: map[uuid.UUID]*unit{}, policyErrors: map[policy.EngineID]string{}, policyFiles: map[policy.EngineID][]string{}, labels: map[labelKey]bool{}, unrecorded: map[uuid.UUID]tombstone{},
		barredKeys: map[string]keyTombstone{}, adopted: make(chan struct{}),
	}
	b.inventory.Store(&inventory{})
	defer func() {
		cancel()
		b.wg.Wait()
		err = errors.Join(err, b.close())
	}()
	if err := b.open(ctx, w); err != nil {
		return err
	}
	if err := b.takeOver(ctx); err != nil {
		return fmt.Errorf("cannot start: %w", err)
	}
	return b.serve(ctx)
}

func (b *Broker) open(ctx context.Context, w Wiring) error {
	for _, dir := range []string{b.o.RuntimeDir, filepath.Join(b.o.RuntimeDir, "vm")} {
		if err := ownDir(dir, 0o711); err != nil {
			return fmt.Errorf("cannot use the runtime directory: %w", err)
		}
	}
	if err := ownDir(b.o.StateDir, 0o700); err != nil {
		return fmt.Errorf("cannot use the state directory: %w", err)
	}
	b.metrics = newMetrics(b)
	var err error
	b.ledger, err = ledger.Open(ctx, ledger.Options{
		Dir: b.o.StateDir, Kinds: b.kinds, Clock: b.o.Clock, Log: b.log, Observe: b.metrics.committed,
	})
	if err != nil {
		return cannotOpen(err)
	}
	if b.keys, err = keys.Open(ctx, b.ledger, b.o.StateDir, b.kinds, b.log); err != nil {
		return err
	}
	b.engines = policy.NewEngines(policy.Options{
		Worker: b.o.PolicyWorker, Stretch: b.o.Stretch, Log: b.log, Name: b.engineName,
	})
	b.reconciler = reconcile.New(reconcile.Options{
		Appliers: w.Appliers(b), Ledger: b.ledger, Clock: b.o.Clock, Instances: b.usable, Log: b.log,
		Meter: b.metrics.meter, Patience: b.o.stretched(5 * time.Second), ObserveTimeout: b.o.stretched(15 * time.Second),
		ApplyTimeout:    b.o.stretched(90 * time.Second),
		WithdrawTimeout: b.o.stretched(b.o.CutDeadline + 20*time.Second),
		Begin:           b.adopted,
	})
	return nil
}

func (b *Broker) close() error {
	if b.reconciler != nil {
		b.reconciler.Close()
	}
	if b.engines != nil {
		b.engines.Close()
	}
	if b.ledger == nil {
		return nil
	}
	failpoint.Hit("close.before")
	_, err := b.ledger.Update(context.WithoutCancel(b.ctx), func(tx *ledger.Tx) error {
		return tx.Append(ledger.Event{Type: ledger.BrokerStopped, Actor: brokerActor})
	})
	failpoint.Hit("close.recorded")
	return errors.Join(err, b.ledger.Close())
}

// takeOver brings the world and the ledger together: it adopts the VMs that
// run, removes what nobody owns, and finishes or undoes what the last broker
// had begun.
func (b *Broker) takeOver(ctx context.Context) error {
	_, err := b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		err := tx.Append(ledger.Event{Type: ledger.BrokerStarted, Actor: brokerActor, Data: ledger.JSON(struct {
			Version string `json:"version"`
			PID     int    `json:"pid"`
		}{b.o.Version, os.Getpid()})})
		return errors.Join(err, tx.Append(ledger.NewMark(brokerActor, tx.Now())))
	})
	if err != nil {
		return err
	}
	failpoint.Hit("start.recorded")
	if err := b.findKeyTombstones(ctx); err != nil {
		return err
	}
	if err := b.findTombstones(ctx); err != nil {
		return err
	}
	failpoint.Hit("start.tombstones")
	inv, err := b.scan(ctx)
	if err != nil {
		if info, missing := os.Stat(string(b.o.Partitions)); b.o.Partitions != "" && (errors.Is(missing, fs.ErrNotExist) || missing == nil && !info.IsDir()) {
			return fmt.Errorf("there is no directory %s (--partitions); it is to hold one directory for each mounted user partition, named by its UUID, and may be empty", b.o.Partitions)
		}
		return err
	}
	b.inventory.Store(inv)
	failpoint.Hit("start.scanned")
	if err := b.adopt(ctx); err != nil {
		return err
	}
	// Guests call from the moment that their VM is adopted, and what they end may
	// have heirs in VMs that were not yet.
	close(b.adopted)
	failpoint.Hit("start.adopted")
	if err := b.endStale(ctx); err != nil {
		return err
	}
	failpoint.Hit("start.ended")
	// What is to be cut does not wait for policies, which can take their time.
	for vm := range b.holders() {
		b.reconciler.Wake(vm)
	}
	if err := b.firstPolicies(ctx); err != nil {
		return err
	}
	failpoint.Hit("start.policies")
	if err := b.catchUp(ctx); err != nil {
		return err
	}
	failpoint.Hit("start.caughtup")
	return b.settle(ctx)
}

// adopt finds the shims of the last broker again.
func (b *Broker) adopt(ctx context.Context) error {
	root := filepath.Join(b.o.RuntimeDir, "vm")
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("cannot look for running VMs: %w", err)
	}
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		vm, err := uuid.Parse(e.Name())
		if err != nil {
			b.log.Warn("not a VM's runtime directory; left alone", "path", dir)
			continue
		}
		failpoint.Hit("adopt.before")
		u, err := b.adoptOne(ctx, vm, dir)
		if err != nil && ctx.Err() != nil {
			return ctx.Err() // the broker ends, and its VMs run on
		}
		if err != nil {
			b.log.Warn("a VM did not outlive the last broker", "vm", vm, "why", err)
			failpoint.Hit("adopt.reap.before")
			if err := shim.Reap(dir); err != nil {
				return fmt.Errorf("cannot clear what VM %s left: %w", vm, err)
			}
			continue
		}
		b.mu.Lock()
		b.running[vm] = u
		b.mu.Unlock()
		b.attend(u)
		failpoint.Hit("adopt.after")
		if _, known := b.inv().definitions[vm]; !known {
			b.log.Warn("stopping a VM whose definition is gone", "vm", vm)
			if err := b.stopVM(ctx, brokerActor, u, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// adoptOne finds one shim again. One that lives and is slow is waited for: its
// VM is killed only if it stays silent.
func (b *Broker) adoptOne(ctx context.Context, vm uuid.UUID, dir string) (*unit, error) {
	ctx, cancel := context.WithTimeout(ctx, b.o.stretched(30*time.Second))
	defer cancel()
	for {
		client, state, err := b.reach(ctx, dir)
		if err == nil {
			switch {
			case state.VM != vm:
				err = fmt.Errorf("the shim says it runs VM %s", state.VM)
			case state.Phase == shim.Stopped:
				err = fmt.Errorf("it has stopped: %s", state.ExitReason)
			default:
				return newUnit(vm, dir, client, state), nil
			}
			err = errors.Join(err, client.Kill())
			client.Close()
			return nil, err
		}
		if errors.Is(err, shim.ErrNoShim) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// reach asks the shim of a directory for its state.
func (b *Broker) reach(ctx context.Context, dir string) (*shim.Client, shim.State, error) {
	client, err := shim.Dial(dir)
	if err != nil {
		return nil, shim.State{}, err
	}
	state, err := client.State(ctx)
	if err != nil {
		client.Close()
		return nil, shim.State{}, err
	}
	return client, state, nil
}

// endStale ends the grants of runs that are over, those of VMs whose definition
// is gone, and those on partitions that are not there.
func (b *Broker) endStale(ctx context.Context) error {
	instances := b.instances()
	inv := b.inv()
	_, err := b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		s := tx.State()
		var stale []ledger.Grant
		reasons := map[uuid.UUID]string{}
		for _, vm := range s.Holders() {
			instance, running := instances[vm]
			_, known := inv.definitions[vm]
			for h := range s.Held(vm) {
				reason := ""
				if !known {
					reason = "the definition of its VM is gone"
				}
				if h.HasResource {
					if _, present := inv.partitions[h.Resource]; !present {
						reason = fmt.Sprintf("partition %s is not there", h.Resource)
					}
				}
				if !h.Persist && (!running || instance != h.Instance) {
					reason = "the VM ended while no broker ran"
				}
				if reason == "" || h.State == ledger.Revoking {
					continue
				}
				g, _ := s.Grant(h.ID)
				stale = append(stale, g)
				reasons[h.ID] = reason
			}
		}
		slices.SortFunc(stale, func(x, y ledger.Grant) int { return cmp.Compare(x.Seq, y.Seq) })
		for _, g := range stale {
			if err := tx.Append(ledger.NewChange(ledger.GrantRevoking, brokerActor, g.ID, ledger.Change{Reason: reasons[g.ID]})); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

// catchUp records the runs of VMs that ended or began while no broker ran, and
// requests what is declared for those that began.
func (b *Broker) catchUp(ctx context.Context) error {
	units := b.units()
	var runs map[uuid.UUID]string
	b.ledger.View(func(s *ledger.State) { runs = s.Runs() })
	vms := map[uuid.UUID]bool{}
	for vm := range runs {
		vms[vm] = true
	}
	for vm := range units {
		vms[vm] = true
	}
	for vm := range vms {
		was, on := runs[vm]
		is, u := "", units[vm]
		if u != nil {
			is = u.instance()
		}
		if was == is {
			continue
		}
		if on {
			if err := b.recordRun(ctx, ledger.VMExited, brokerActor, vm, was, "the VM ended while no broker ran"); err != nil {
				return err
			}
		}
		if u != nil {
			if err := b.recordRun(ctx, ledger.VMStarted, brokerActor, vm, is, "found running"); err != nil {
				return err
			}
			b.requestDeclared(u)
		}
	}
	return nil
}

// holders are the VMs that run, or hold a grant that is not final.
func (b *Broker) holders() map[uuid.UUID]bool {
	holders := map[uuid.UUID]bool{}
	b.ledger.View(func(s *ledger.State) {
		for _, vm := range s.Holders() {
			holders[vm] = true
		}
	})
	for vm := range b.units() {
		holders[vm] = true
	}
	return holders
}

// settle returns when no VM has anything left to withdraw and no grant is
// between two states, or after a bound that a hostile guest cannot stretch.
func (b *Broker) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, b.o.stretched(b.o.CutDeadline+30*time.Second), errUnsettled)
	defer cancel()
	rest := b.holders()
	for {
		for vm := range rest {
			settled, err := b.reconciler.Settled(ctx, vm)
			switch {
			case err == nil && settled:
				// It is not looked at again.
				delete(rest, vm)
				continue
			case errors.Is(context.Cause(ctx), errUnsettled):
				b.log.Error("serving although VMs are not settled", "vm", vm, "vms", len(rest), "err", err)
				return nil
			case ctx.Err() != nil:
				return ctx.Err()
			}
			b.reconciler.Wake(vm)
		}
		if len(rest) == 0 {
			return nil
		}
		select {
		case <-ctx.Done(): // what that means is above
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// errUnsettled ends the wait for VMs that are not settled.
var errUnsettled = errors.New("not all VMs are settled")

// serve tells that the broker is ready and serves people until ctx ends.
func (b *Broker) serve(ctx context.Context) error {
	failpoint.Hit("ready.before")
	l, err := api.ListenHost(b.o.Socket, b.o.SocketMode, b.o.SocketGroup)
	if err != nil {
		return err
	}
	b.wg.Go(func() { b.keepTime(ctx) })
	if b.o.RotateAuditAt > 0 {
		b.wg.Go(func() { b.keepAudit(ctx) })
	}
	b.ready.Store(true)
	failpoint.Hit("ready.after")
	b.log.Info("ready", "socket", b.o.Socket, "vms", len(b.units()))
	if b.o.Ready != nil {
		b.o.Ready()
	}
	handler := api.NewHostHandler(b, api.HostOptions{Log: b.log, Metrics: b.metrics.handler(), Streams: &b.metrics.streams})
	return api.ServeHost(ctx, l, handler, api.ServeOptions{Log: b.log})
}

// keepTime wakes the VMs whose leases end, and leaves marks of the wall clock
// while there are any, so that setting it back across a restart extends nothing.
func (b *Broker) keepTime(ctx context.Context) {
	const look, mark = time.Second, time.Minute
	changes, err := clock.Changes(ctx)
	if err != nil {
		b.log.Warn("a clock that is set is noticed late", "err", err)
	}
	tick := time.NewTicker(look)
	defer tick.Stop()
	var tried time.Time
	var mending mending
	for {
		b.mend(ctx, &mending)
		if b.strayed.Swap(false) {
			if err := b.sweep(ctx); err != nil {
				b.strayed.Store(true)
				if ctx.Err() == nil {
					b.log.Error("cannot record which VMs ended", "err", err)
				}
			}
		}
		if err := errors.Join(b.recordKeyTombstones(ctx), b.recordTombstones(ctx)); err != nil && ctx.Err() == nil {
			b.log.Error("access was cut and the ledger still cannot be told", "err", err)
		}
		now := b.o.Clock.Now()
		wait, unmarked := look, false
		var due map[uuid.UUID]struct{}
		b.ledger.View(func(s *ledger.State) {
			due = s.DueHolders(now)
			// Every event is a mark; without leases none is needed.
			if next, ok := s.NextDeadline(now); ok {
				unmarked = s.Effective(now).Wall.Sub(s.HighWater()) > mark
				if next > 0 {
					wait = min(wait, next)
				}
			}
		})
		// Not within the view: who is woken may take b.mu, with which held others
		// look at the ledger.
		for vm := range due {
			b.reconciler.Wake(vm)
		}
		if unmarked && time.Since(tried) > mark {
			tried = time.Now()
			_, err := b.ledger.Update(ctx, func(tx *ledger.Tx) error {
				return tx.Append(ledger.NewMark(brokerActor, tx.Now()))
			})
			if err != nil && ctx.Err() == nil {
				b.log.Error("cannot record the time", "err", err)
			}
		}
		tick.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-changes:
		}
	}
}
