package broker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/agents/wire"
	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/applyfs"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/failpoint"
	"spectrum-os.org/broker/sources"
	"spectrum-os.org/broker/vmm/shim"
)

// unit is one VM that runs: its shim, the socket its guest calls on, and what
// is known of its agent.
type unit struct {
	vm     uuid.UUID
	dir    string
	client *shim.Client
	cancel context.CancelFunc // ends the unit's goroutines, not the VM
	done   chan struct{}      // closed when they have ended and the VM is gone

	mu       sync.Mutex
	state    shim.State
	started  time.Time // of the instance
	agent    api.Agent
	agentSet chan struct{} // closed once agent.State of this instance is not unknown
	stopping bool
	stopper  *ledger.Actor // who asked for the VM's end
}

func newUnit(vm uuid.UUID, dir string, client *shim.Client, state shim.State) *unit {
	return &unit{
		vm: vm, dir: dir, client: client, state: state, started: time.Now(), done: make(chan struct{}),
		agent: api.Agent{State: api.AgentUnknown}, agentSet: make(chan struct{}),
	}
}

func (u *unit) snapshot() (state shim.State, agent api.Agent, started time.Time, stopping bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state, u.agent, u.started, u.stopping
}

func (u *unit) instance() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state.Instance
}

// observe takes in a state of the shim.
func (u *unit) observe(s shim.State) {
	u.mu.Lock()
	defer u.mu.Unlock()
	rebooted := u.state.Instance != s.Instance
	u.state = s
	if rebooted {
		u.started = time.Now()
		u.resetAgent()
	}
}

// pause makes the unit one that can be given nothing, as while it boots.
func (u *unit) pause() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.state.Phase = shim.Starting
}

// endedBy is who asked for the VM's end, or else the broker.
func (u *unit) endedBy() ledger.Actor {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.stopper == nil {
		return brokerActor
	}
	return *u.stopper
}

func (u *unit) resetAgent() {
	u.agent = api.Agent{State: api.AgentUnknown}
	select {
	case <-u.agentSet:
		u.agentSet = make(chan struct{})
	default:
	}
}

// setAgent tells whether the agent became healthy by this.
func (u *unit) setAgent(instance string, a api.Agent) (recovered bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.state.Instance != instance {
		return false
	}
	recovered = a.State == api.AgentHealthy && u.agent.State != api.AgentHealthy
	u.agent = a
	select {
	case <-u.agentSet:
	default:
		close(u.agentSet)
	}
	return recovered
}

func (b *Broker) vmDir(vm uuid.UUID) string {
	return filepath.Join(b.o.RuntimeDir, "vm", vm.String())
}

// units is a copy of what runs.
func (b *Broker) units() map[uuid.UUID]*unit {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make(map[uuid.UUID]*unit, len(b.running))
	for id, u := range b.running {
		if u != nil {
			out[id] = u
		}
	}
	return out
}

func (b *Broker) unit(vm uuid.UUID) *unit {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.running[vm]
}

// Shim implements applyfs.Host.
func (b *Broker) Shim(vm uuid.UUID) (applyfs.Shim, bool) {
	if u := b.unit(vm); u != nil {
		return u.client, true
	}
	return nil, false
}

// Agent implements applyfs.Host.
func (b *Broker) Agent(ctx context.Context, vm uuid.UUID) (applyfs.Agent, error) {
	u := b.unit(vm)
	if u == nil {
		return nil, errors.New("the VM does not run")
	}
	u.mu.Lock()
	set := u.agentSet
	u.mu.Unlock()
	select {
	case <-set:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-u.done:
		return nil, errors.New("the VM ended")
	}
	if _, agent, _, _ := u.snapshot(); agent.State == api.AgentAbsent {
		return nil, wire.ErrUnreachable
	}
	return b.agentClient(u), nil
}

func (b *Broker) agentClient(u *unit) *wire.Client {
	return wire.NewHybridClient(filepath.Join(u.dir, "vsock.sock"))
}

// instances is the current run of every VM that runs.
func (b *Broker) instances() map[uuid.UUID]string {
	out := map[uuid.UUID]string{}
	for id, u := range b.units() {
		out[id] = u.instance()
	}
	return out
}

// usable is the current run of every VM that can be given something now: not
// of one that still boots, or already ends.
func (b *Broker) usable() map[uuid.UUID]string {
	out := map[uuid.UUID]string{}
	for id, u := range b.units() {
		if state, _, _, _ := u.snapshot(); state.Phase == shim.Running {
			out[id] = state.Instance
		}
	}
	return out
}

// startVM boots a VM and requests the grants that its definition declares.
func (b *Broker) startVM(ctx context.Context, actor ledger.Actor, d sources.Definition) (*unit, error) {
	// The nil entry keeps a second start out while this one is under way.
	b.mu.Lock()
	if _, busy := b.running[d.ID]; busy {
		b.mu.Unlock()
		return nil, api.Errorf(api.CodeConflict, "VM %s runs already, or is just being started", b.vmName(d.ID))
	}
	b.running[d.ID] = nil
	b.mu.Unlock()
	u, err := b.bootOnRecord(ctx, actor, d)
	b.mu.Lock()
	if err != nil {
		delete(b.running, d.ID)
	} else {
		b.running[d.ID] = u
	}
	b.mu.Unlock()
	if err != nil {
		// Whether the start is on record may be unknown.
		b.strayed.Store(true)
		return nil, err
	}
	b.attend(u)
	// Grants that were made before it was there to be seen are waiting for it.
	b.reconciler.Wake(u.vm)
	b.requestDeclared(u)
	return u, nil
}

// bootOnRecord boots a VM and records the run. A run that is not on record must
// not be, and nothing is given to one.
func (b *Broker) bootOnRecord(ctx context.Context, actor ledger.Actor, d sources.Definition) (*unit, error) {
	u, err := b.boot(ctx, d)
	if err != nil {
		return nil, err
	}
	failpoint.Hit("vm.booted")
	err = b.recordRun(ctx, ledger.VMStarted, actor, u.vm, u.instance(), "")
	if err == nil {
		failpoint.Hit("vm.recorded")
		return u, nil
	}
	err = errors.Join(unrecorded("the VM is not started", err), u.client.Kill(), shim.Reap(u.dir))
	u.client.Close()
	return nil, err
}

func (b *Broker) boot(ctx context.Context, d sources.Definition) (*unit, error) {
	boot, err := d.OpenBoot()
	if err != nil {
		return nil, api.Errorf(api.CodeInvalid, "cannot start %s: %w", b.vmName(d.ID), err)
	}
	defer boot.Close()
	dir := b.vmDir(d.ID)
	if err := shim.Reap(dir); err != nil {
		return nil, fmt.Errorf("cannot clear what VM %s left: %w", d.ID, err)
	}
	spec := shim.Spec{
		VM: d.ID, RuntimeDir: dir, VMM: b.o.VMM, Virtiofsd: b.o.Virtiofsd,
		MemoryMiB: d.MemoryMiB, VCPUs: d.VCPUs, Segments: b.o.Segments, Cmdline: d.Cmdline,
		Initrd: boot.Initrd != nil, CutDeadline: b.o.CutDeadline, Stretch: b.o.Stretch,
	}
	var disks []*os.File
	for _, disk := range boot.Disks {
		spec.Disks = append(spec.Disks, shim.DiskSpec{ReadOnly: disk.ReadOnly})
		disks = append(disks, disk.File)
	}
	failpoint.Hit("vm.start.before")
	client, err := shim.Start(ctx, shim.StartOptions{
		Binary: b.o.Shim, Spec: spec, Kernel: boot.Kernel, Initrd: boot.Initrd, Disks: disks, Log: b.log,
	})
	if err != nil {
		// Its logs went with its runtime directory: what it said last is in err.
		err = fmt.Errorf("%w; it never ran: see whether %s (--vmm) starts by itself, and whether %s is a kernel that it boots",
			err, b.o.VMM, filepath.Join(string(d.Dir), "vmlinux"))
		return nil, errors.Join(err, shim.Reap(dir))
	}
	state, err := client.State(ctx)
	if err != nil {
		return nil, errors.Join(err, client.Kill(), shim.Reap(dir))
	}
	return newUnit(d.ID, dir, client, state), nil
}

// attend serves a unit's guest and watches its shim until it ends.
func (b *Broker) attend(u *unit) {
	ctx, cancel := context.WithCancel(b.ctx)
	u.cancel = cancel
	b.wg.Go(func() {
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { b.serveGuest(ctx, u) })
		wg.Go(func() { b.pollAgent(ctx, u) })
		ended := b.watch(ctx, u)
		cancel()
		wg.Wait()
		if ended {
			b.ended(u)
		}
		close(u.done)
	})
}

// serveGuest serves the VM's own API on its own socket: that is how the VM is
// known.
func (b *Broker) serveGuest(ctx context.Context, u *unit) {
	path := filepath.Join(u.dir, fmt.Sprintf("vsock.sock_%d", wire.GuestPort))
	l, err := api.ListenGuest(path)
	if err != nil {
		b.log.Error("a guest cannot call the broker", "vm", u.vm, "err", err)
		return
	}
	handler := api.NewGuestHandler(guestService{b}, u.vm, api.GuestOptions{Log: b.log})
	if err := api.ServeGuest(ctx, l, handler, api.ServeOptions{Log: b.log}); err != nil && !errors.Is(err, net.ErrClosed) {
		b.log.Error("a guest's API ended", "vm", u.vm, "err", err)
	}
}

// watch follows the shim until the VM has ended (true) or the broker does.
func (b *Broker) watch(ctx context.Context, u *unit) (ended bool) {
	state, _, _, _ := u.snapshot()
	for {
		next, err := u.client.Watch(ctx, state.Seq)
		if ctx.Err() != nil {
			return false
		}
		select {
		case <-u.client.Exited():
			return true
		default:
		}
		if err != nil {
			b.log.Warn("a shim does not answer", "vm", u.vm, "err", err)
			select {
			case <-time.After(200 * time.Millisecond):
			case <-u.client.Exited():
				return true
			case <-ctx.Done():
				return false
			}
			continue
		}
		state = next
		if before := u.instance(); before != state.Instance {
			if !b.rebooted(ctx, u, before, state) {
				return ctx.Err() == nil
			}
		} else {
			u.observe(state)
		}
		if state.Phase == shim.Stopped {
			// The shim tells it once more and ends by itself.
			select {
			case <-u.client.Exited():
			case <-time.After(b.o.stretched(10 * time.Second)):
				_ = u.client.Kill()
				<-u.client.Exited()
			case <-ctx.Done():
				return false
			}
			return true
		}
		b.reconciler.Wake(u.vm)
	}
}

// rebooted ends one run of the VM and begins the next. Until both are on
// record the VM can be given nothing. It is false when the VM, or the broker,
// ended before that.
func (b *Broker) rebooted(ctx context.Context, u *unit, before string, now shim.State) bool {
	u.pause()
	b.endRun(u, brokerActor, before, "the VM rebooted")
	failpoint.Hit("vm.reboot.ended")
	for {
		err := b.recordRun(ctx, ledger.VMStarted, brokerActor, u.vm, now.Instance, "reboot")
		if err == nil {
			break
		}
		b.log.Error("cannot record a reboot", "vm", u.vm, "err", err)
		select {
		case <-time.After(time.Second):
		case <-u.client.Exited():
			return false
		case <-ctx.Done():
			return false
		}
	}
	failpoint.Hit("vm.reboot.recorded")
	u.observe(now)
	b.requestDeclared(u)
	return true
}

// ended removes all that is left of a VM, then its grants.
func (b *Broker) ended(u *unit) {
	failpoint.Hit("vm.ended")
	for {
		err := shim.Reap(u.dir)
		if err == nil {
			break
		}
		// While anything of it may live, its grants are not said to be gone.
		b.log.Error("cannot clear what a VM left", "vm", u.vm, "err", err)
		select {
		case <-time.After(time.Second):
		case <-b.ctx.Done():
			return
		}
	}
	b.mu.Lock()
	delete(b.running, u.vm)
	b.mu.Unlock()
	state, _, _, _ := u.snapshot()
	reason := "the VM ended"
	if state.ExitReason != "" {
		reason += ": " + state.ExitReason
	}
	failpoint.Hit("vm.reaped")
	b.endRun(u, u.endedBy(), state.Instance, reason)
	failpoint.Hit("vm.end.recorded")
}

// endRun records that a run of the VM is over, and ends the grants that were
// tied to it.
func (b *Broker) endRun(u *unit, actor ledger.Actor, instance, reason string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(b.ctx), 10*time.Second)
	defer cancel()
	events, err := b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := appendRun(tx, ledger.VMExited, actor, u.vm, instance, reason); err != nil {
			return err
		}
		return endStrayed(tx, u.vm, reason)
	})
	if err != nil {
		b.log.Error("cannot record that a VM and its grants ended; it is tried again", "vm", u.vm, "err", err)
		b.strayed.Store(true)
	}
	b.reconciler.Wake(u.vm)
	b.reconciler.WakeHeirs(events)
}

// endStrayed starts the revocation of the grants that are tied to another run
// of a VM than the one that is on record. The nil UUID: of any VM.
func endStrayed(tx *ledger.Tx, vm uuid.UUID, reason string) error {
	s := tx.State()
	for _, g := range s.Grants(ledger.Filter{Holder: vm, States: liveStates}) {
		if run, on := s.Running(g.Holder); g.Persist || on && run == g.Instance {
			continue
		}
		if err := tx.Append(ledger.NewChange(ledger.GrantRevoking, brokerActor, g.ID, ledger.Change{Reason: reason})); err != nil {
			return err
		}
	}
	return nil
}

// sweep makes up for ends of runs that could not be recorded when they
// happened.
func (b *Broker) sweep(ctx context.Context) error {
	var runs map[uuid.UUID]string
	b.ledger.View(func(s *ledger.State) { runs = s.Runs() })
	// A run that was on record before this look, and has no unit now, is over.
	b.mu.Lock()
	for vm := range b.running {
		delete(runs, vm)
	}
	b.mu.Unlock()
	var holders []uuid.UUID
	_, err := b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		const reason = "the VM ended"
		for vm, run := range runs {
			if is, on := tx.State().Running(vm); !on || is != run {
				continue
			}
			if err := appendRun(tx, ledger.VMExited, brokerActor, vm, run, reason); err != nil {
				return err
			}
		}
		if err := endStrayed(tx, uuid.Nil, reason); err != nil {
			return err
		}
		var ending []uuid.UUID
		for _, g := range tx.State().Grants(ledger.Filter{States: []ledger.GrantState{ledger.Revoking}}) {
			ending = append(ending, g.ID)
		}
		holders = tx.State().Heirs(ending...)
		return nil
	})
	if err != nil {
		return err
	}
	for _, vm := range holders {
		b.reconciler.Wake(vm)
	}
	return nil
}

func appendRun(tx *ledger.Tx, t ledger.EventType, actor ledger.Actor, vm uuid.UUID, instance, reason string) error {
	partition, _ := tx.State().Binding(vm)
	return tx.Append(ledger.Event{
		Type: t, Actor: actor, VM: vm, Partition: partition,
		Data: ledger.JSON(ledger.RunData{Instance: instance, Reason: reason}),
	})
}

func (b *Broker) recordRun(ctx context.Context, t ledger.EventType, actor ledger.Actor, vm uuid.UUID, instance, reason string) error {
	_, err := b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		return appendRun(tx, t, actor, vm, instance, reason)
	})
	return err
}

// pollAgent keeps an eye on the VM's agent: often while it boots, rarely once
// it answered. An agent that answers again is asked to mount what it missed.
func (b *Broker) pollAgent(ctx context.Context, u *unit) {
	client := b.agentClient(u)
	for {
		instance := u.instance()
		_, before, started, _ := u.snapshot()
		callCtx, cancel := context.WithTimeout(ctx, b.o.stretched(2*time.Second))
		h, err := client.Health(callCtx)
		cancel()
		if ctx.Err() != nil {
			return
		}
		wait := b.o.stretched(10 * time.Second)
		switch {
		case err == nil:
			back := u.setAgent(instance, api.Agent{State: api.AgentHealthy, Version: wire.Printable(h.Version, 64)})
			b.reconciler.AgentAnswers(ctx, u.vm, back)
		case before.State == api.AgentHealthy, time.Since(started) > b.o.stretched(b.o.BootGrace):
			u.setAgent(instance, api.Agent{State: api.AgentAbsent, Detail: err.Error()})
			wait = b.o.stretched(2 * time.Second)
		default:
			wait = 200 * time.Millisecond
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// stopVM asks the guest to power off, and ends it when it does not in time.
func (b *Broker) stopVM(ctx context.Context, actor ledger.Actor, u *unit, grace time.Duration) error {
	u.mu.Lock()
	u.stopping, u.stopper = true, &actor
	u.mu.Unlock()
	failpoint.Hit("vm.stop.before")
	if err := u.client.Stop(ctx, grace); err != nil {
		select {
		case <-u.client.Exited():
		default:
			return fmt.Errorf("cannot stop VM %s: %w", u.vm, err)
		}
	}
	select {
	case <-u.done:
		failpoint.Hit("vm.stop.after")
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
