// Package applyfs makes file grants true: a directory or file of a partition,
// shared with a VM by a virtiofsd of its own, and mounted by the VM's agent.
//
// Its laws: what is shared is the descriptor that was opened beneath the
// partition's files/, never a name that is opened again; nothing of a
// partition stays open here once an object is applied; a withdrawal needs
// neither the guest nor its agent; and what an agent says changes only what
// people are told, never what is withdrawn.
package applyfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/agents/wire"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/failpoint"
	"spectrum-os.org/broker/sources"
	"spectrum-os.org/broker/vmm/shim"
)

// Kind is the capability kind that this package applies.
const Kind = "fs"

// NoAgent is the note on a share that no agent mounted.
const NoAgent = "attached, but the guest has no agent to mount it"

// Shim is what serves a VM's shares.
type Shim interface {
	State(ctx context.Context) (shim.State, error)
	Put(ctx context.Context, o shim.Object, f *os.File) (shim.ObjectState, error)
	Remove(ctx context.Context, id string, generation uint64) (shim.ObjectState, error)
	Extend(ctx context.Context, e shim.Extension) (shim.ObjectState, error)
}

// Agent mounts shares inside a VM.
type Agent interface {
	Mount(ctx context.Context, r wire.MountRequest) (wire.MountReply, error)
	Unmount(ctx context.Context, label string) error
}

// Host is what the applier needs to know of VMs and partitions.
type Host interface {
	// Shim is the VM's, or false where the VM does not run and nothing that
	// served it is left.
	Shim(vm uuid.UUID) (Shim, bool)
	// Agent waits until the VM's agent answers, or is known not to, or ctx
	// ends.
	Agent(ctx context.Context, vm uuid.UUID) (Agent, error)
	Partition(id uuid.UUID) (sources.Partition, bool)
}

// Applier applies file grants.
type Applier struct {
	host Host
	// mountTimeout is how long an agent may take to mount.
	mountTimeout time.Duration
}

// New returns an applier. mountTimeout is how long an agent may take to mount
// a share.
func New(host Host, mountTimeout time.Duration) *Applier {
	return &Applier{host: host, mountTimeout: mountTimeout}
}

// Kind is "fs".
func (a *Applier) Kind() string { return Kind }

// objectID is the id of the one object of a file grant.
func objectID(grant uuid.UUID) string { return "fs-" + grant.String() }

// tag is the virtio-fs tag of a grant: 32 of the 36 bytes it may have.
func tag(objectID string) string {
	id, err := uuid.Parse(objectID[len("fs-"):])
	if err != nil {
		return objectID
	}
	return fmt.Sprintf("%x", id[:])
}

// Objects returns the one share that a file grant needs.
func (a *Applier) Objects(g ledger.Grant) []reconcile.Object {
	o := reconcile.Object{
		ID: objectID(g.ID), Kind: Kind, VM: g.Holder, Instance: g.Instance,
		Generation: g.Generation, Deadline: g.Deadline, Capability: g.Capability, Label: g.Label,
	}
	if g.Persist {
		o.Instance = ""
	}
	return []reconcile.Object{o}
}

// Observe asks the VM's shim.
func (a *Applier) Observe(ctx context.Context, vm uuid.UUID) ([]reconcile.Observed, error) {
	if _, ok := a.host.Shim(vm); !ok {
		return nil, nil
	}
	state, err := a.state(ctx, vm)
	if err != nil {
		return nil, err
	}
	out := make([]reconcile.Observed, 0, len(state.Objects))
	for _, o := range state.Objects {
		out = append(out, reconcile.Observed{
			ID: o.ID, Kind: Kind, VM: vm, Instance: state.Instance, Generation: o.Generation,
			Presence: presence(o), Deadline: o.Deadline, Detail: detail(o),
		})
	}
	return out, nil
}

// Run is the VM's present run, as its shim sees it.
func (a *Applier) Run(ctx context.Context, vm uuid.UUID) (instance string, err error) {
	state, err := a.state(ctx, vm)
	return state.Instance, err
}

// state is what the shim of a VM's present run sees.
func (a *Applier) state(ctx context.Context, vm uuid.UUID) (shim.State, error) {
	noRun := fmt.Errorf("VM %s: %w", vm, reconcile.ErrNotNow)
	s, ok := a.host.Shim(vm)
	if !ok {
		return shim.State{}, noRun
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	state, err := s.State(ctx)
	switch {
	case errors.Is(err, shim.ErrNoShim):
		err = fmt.Errorf("%w: %w", noRun, err)
	case err == nil && state.VMMPid == 0:
		// Its objects went with the run. That says nothing of those that wait
		// for the next one.
		err = noRun
	}
	return state, err
}

func presence(o shim.ObjectState) reconcile.Presence {
	switch o.Phase {
	case shim.Attached:
		return reconcile.Present
	case shim.Attaching:
		return reconcile.Arriving
	case shim.Gone:
		return reconcile.Gone
	}
	return reconcile.Leaving
}

// detail says what is unusual about a share, or "".
func detail(o shim.ObjectState) string {
	switch {
	case o.Killed:
		return "the guest did not let go in time; what served it was killed"
	case o.Error != "":
		return o.Error
	}
	return ""
}

// Apply opens the path, has the VM's shim share it, and the VM's agent mount
// it. A guest without an agent has the share all the same, and the note says
// so.
func (a *Applier) Apply(ctx context.Context, o reconcile.Object) (note string, err error) {
	s, ok := a.host.Shim(o.VM)
	if !ok {
		return "", fmt.Errorf("VM %s: %w", o.VM, reconcile.ErrNotNow)
	}
	file, err := a.share(ctx, s, o)
	if err != nil {
		return "", err
	}
	failpoint.Hit("fs.put")
	return a.mount(ctx, o, file)
}

// Check opens the path that a file capability names, so that one which is not
// there, or leads out of the partition, is refused before there is a grant.
func (a *Applier) Check(_ context.Context, c capabilities.Capability) error {
	opened, _, err := a.open(c)
	if err != nil {
		return err
	}
	return opened.Close()
}

func (a *Applier) open(c capabilities.Capability) (*sources.Opened, sources.Partition, error) {
	r, ok := c.Resource.(capabilities.FSResource)
	if !ok {
		return nil, sources.Partition{}, fmt.Errorf("%s is not a file capability", c)
	}
	partition, ok := a.host.Partition(r.PartitionID)
	if !ok {
		return nil, sources.Partition{}, fmt.Errorf("partition %s is not there", r.PartitionID)
	}
	opened, err := partition.Open(r.Path)
	return opened, partition, err
}

// share returns the file's name where the share is a single file.
func (a *Applier) share(ctx context.Context, s Shim, o reconcile.Object) (file string, err error) {
	opened, partition, err := a.open(o.Capability)
	if err != nil {
		return "", err
	}
	defer opened.Close()
	failpoint.Hit("fs.opened")
	if !opened.IsDir() {
		file = opened.Name()
	}
	_, err = s.Put(ctx, shim.Object{
		ID: o.ID, Generation: o.Generation, Instance: o.Instance, Tag: tag(o.ID),
		ReadOnly: readOnly(o.Capability), SingleFile: file,
		UID: partition.OwnerUID, GID: partition.OwnerGID, Deadline: o.Deadline,
	}, opened.File())
	switch _, refused := errors.AsType[*shim.Error](err); {
	case err == nil:
	case a.noRun(o.VM, err):
		err = fmt.Errorf("%w: %w", reconcile.ErrNotNow, err)
	case !refused:
		// What the shim answers is final: it makes nothing of a generation that
		// failed. Who got no answer asks again, and is told what came of it.
		err = fmt.Errorf("the VM's shim does not answer: %w: %w", reconcile.ErrTransient, err)
	}
	return file, err
}

// noRun tells whether a shim's error means that the run of the VM that it was
// asked for is over. A shim that lives and does not answer is no such case.
func (a *Applier) noRun(vm uuid.UUID, err error) bool {
	if refused, ok := errors.AsType[*shim.Error](err); ok {
		return refused.Code == shim.CodeNotRunning || refused.Code == shim.CodeWrongInstance
	}
	_, alive := a.host.Shim(vm)
	return !alive || errors.Is(err, shim.ErrNoShim)
}

func readOnly(c capabilities.Capability) bool { return !c.Rights.Has("write") }

// AgentBack mounts a share again whose agent was away. What is shared is the
// shim's to say: the name on the host may be another's by now, or nobody's.
func (a *Applier) AgentBack(ctx context.Context, o reconcile.Object) error {
	state, err := a.state(ctx, o.VM)
	if err != nil {
		return fmt.Errorf("%w: %w", reconcile.ErrNotNow, err)
	}
	i := slices.IndexFunc(state.Objects, func(seen shim.ObjectState) bool { return seen.ID == o.ID && seen.Phase == shim.Attached })
	if i < 0 {
		return fmt.Errorf("%s is not attached: %w", o.ID, reconcile.ErrNotNow)
	}
	file := ""
	if r, ok := o.Capability.Resource.(capabilities.FSResource); ok && state.Objects[i].SingleFile {
		file = path.Base(r.Path.String())
	}
	note, err := a.mount(ctx, o, file)
	if err == nil && note != "" {
		err = errors.New(note)
	}
	return err
}

// Place is where the guest has the share, if its agent mounted it.
func (a *Applier) Place(g ledger.Grant) string {
	if g.State != ledger.Active || g.Reason != "" {
		return ""
	}
	return wire.MountPath(g.Label)
}

// mount has the VM's agent mount a share that is attached. An agent that is
// absent, slow or hostile costs the share nothing; the note tells.
func (a *Applier) mount(ctx context.Context, o reconcile.Object, file string) (note string, err error) {
	agent, err := a.host.Agent(ctx, o.VM)
	if err != nil {
		return NoAgent, nil //nolint:nilerr // the share is there; who has no agent mounts it by hand
	}
	err = a.askAgent(ctx, agent, wire.MountRequest{
		Tag: tag(o.ID), Label: o.Label, ReadOnly: readOnly(o.Capability), File: file,
		TimeoutMS: int(a.mountTimeout.Milliseconds()),
	})
	switch {
	case errors.Is(err, wire.ErrUnreachable):
		return NoAgent, nil
	case errors.Is(err, context.DeadlineExceeded):
		return "attached, but the guest's agent did not mount it in time", nil
	case err != nil:
		return "attached, but the guest's agent could not mount it: " + err.Error(), nil
	}
	return "", nil
}

// askAgent asks more than once where nobody answers, as a vsock connection can
// be lost while the guest is busy, and where the agent is at it already, as
// when it has just come back. Mounting is idempotent.
func (a *Applier) askAgent(ctx context.Context, agent Agent, r wire.MountRequest) error {
	const lost, pause = 4, 250 * time.Millisecond
	ctx, cancel := context.WithTimeout(ctx, a.mountTimeout+2*time.Second)
	defer cancel()
	for unreachable := 0; ; {
		_, err := agent.Mount(ctx, r)
		refused, _ := errors.AsType[*wire.AgentError](err)
		switch {
		case refused != nil && refused.Code == wire.CodeBusy:
		case errors.Is(err, wire.ErrUnreachable) && unreachable < lost:
			unreachable++
		default:
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// Withdraw returns when every process that served the share has ended, and says
// where the guest had to be cut off.
func (a *Applier) Withdraw(ctx context.Context, o reconcile.Object) (note string, err error) {
	s, ok := a.host.Shim(o.VM)
	if !ok {
		return "", nil
	}
	removed, err := s.Remove(ctx, o.ID, o.Generation)
	failpoint.Hit("fs.removed")
	switch _, alive := a.host.Shim(o.VM); {
	case err != nil && !alive:
		return "", nil // the VM ended meanwhile, and everything with it
	case err != nil:
		return "", err
	case removed.Killed:
		return detail(removed), nil
	}
	return "", nil
}
