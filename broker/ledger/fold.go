package ledger

import (
	"encoding/json"
	"fmt"
	"math"

	"github.com/google/uuid"
)

// folder applies events to a layer. It is the only thing that changes state,
// both when an event is appended and when it is loaded.
type folder struct {
	in *interner
}

func kindOf(capability string) string {
	var v struct {
		Kind string `json:"kind"`
	}
	_ = json.Unmarshal([]byte(capability), &v) // a kind of "" is one that nobody knows
	return v.Kind
}

// fold applies e, which follows l's newest event, or says why it may not.
func (f *folder) fold(l *layer, e *entry) error {
	if err := f.step(l, e); err != nil {
		return err
	}
	l.meta.highwater = max(l.meta.highwater, e.Time.UnixNano())
	return nil
}

func (f *folder) step(l *layer, e *entry) error {
	kind, ok := eventKinds[string(e.Type)]
	if !ok {
		return fmt.Errorf("%w: unknown type %q", ErrInvalidEvent, e.Type)
	}
	for _, need := range []struct {
		needed bool
		id     uuid.UUID
		what   string
	}{{kind.grant, e.Grant, "grant"}, {kind.vm, e.VM, "VM"}, {kind.partition, e.Partition, "partition"}} {
		if need.needed && need.id == uuid.Nil {
			return fmt.Errorf("%w: %s without a %s", ErrInvalidEvent, e.Type, need.what)
		}
	}
	if (e.Type == LedgerCreated || e.Type == LedgerRotated) != (l.meta.epoch == 0) {
		return fmt.Errorf("%w: %s where the ledger is in epoch %d", ErrIllegalMove, e.Type, l.meta.epoch)
	}
	if (e.Type == LedgerCarried) != (l.meta.carrying > 0) {
		return fmt.Errorf("%w: %s where %d events of carried state are to come", ErrIllegalMove, e.Type, l.meta.carrying)
	}
	switch e.Type {
	case LedgerCreated:
		return f.created(l, e)
	case LedgerRotated:
		return f.rotated(l, e)
	case LedgerCarried:
		l.meta.carrying--
		return f.carried(l, e)
	case GrantRequested:
		return f.requested(l, e)
	case GrantActive, GrantFailed, GrantRevoking, GrantRevoked, GrantDegraded:
		return f.moved(l, e)
	case GrantRenewed:
		return f.renewed(l, e)
	case GrantUsed:
		return f.used(l, e)
	case GrantTroubled, GrantRecovered:
		return f.troubled(l, e)
	case VMBound:
		return f.bound(l, e)
	case VMStarted, VMExited:
		return f.ran(l, e)
	case NameSet, NameRemoved:
		return f.named(l, e)
	case ClockHighwater:
		return f.clock(l, e)
	case KeyCreated:
		return f.keyCreated(l, e)
	case KeyRevoked:
		return f.keyRevoked(l, e)
	case TokenIssued:
		return f.issued(l, e)
	case LedgerRestored:
		return f.restored(l, e)
	}
	if len(e.data) > 0 && !json.Valid(e.data) {
		return fmt.Errorf("%w: the data of %s is not JSON", ErrInvalidEvent, e.Type)
	}
	return nil
}

func read[T any](e *entry) (T, error) {
	var v T
	if len(e.data) == 0 {
		return v, nil
	}
	if err := json.Unmarshal(e.data, &v); err != nil {
		return v, fmt.Errorf("%w: the data of %s: %w", ErrInvalidEvent, e.Type, err)
	}
	return v, nil
}

func (f *folder) created(l *layer, e *entry) error {
	d, err := read[CreatedData](e)
	if err != nil {
		return err
	}
	if d.Epoch == 0 || d.Ledger == uuid.Nil {
		return fmt.Errorf("%w: a ledger without an id or an epoch", ErrInvalidEvent)
	}
	l.meta.ledger, l.meta.epoch = d.Ledger, d.Epoch
	l.meta.segment = segment{first: e.Seq}
	return nil
}

func (f *folder) requested(l *layer, e *entry) error {
	if _, exists := l.find(e.Grant); exists {
		return fmt.Errorf("%w: grant %s exists already", ErrIllegalMove, e.Grant)
	}
	m, err := move("", e.Type)
	if err != nil {
		return err
	}
	r := &e.req
	capability := f.in.capability(r)
	decision, ok := f.in.json(r.decision)
	if capability == nil || !ok {
		return fmt.Errorf("%w: a capability or decision that is not JSON", ErrInvalidEvent)
	}
	n := node{
		id: e.Grant, capability: capability, label: f.in.string(r.label), seq: e.Seq, created: e.Time.UnixNano(),
		parent: none, firstChild: none, nextSibling: none, nextHeld: none, generation: 1, state: stateIndex(m.To),
	}
	if r.hasDeadline {
		if r.boot > math.MaxInt64 {
			return fmt.Errorf("%w: a deadline at %d ns of boot time", ErrInvalidEvent, r.boot)
		}
		n.wall, n.boot = r.wall, int64(r.boot)
	}
	if r.parent != uuid.Nil {
		p, ok := l.find(r.parent)
		if !ok {
			return fmt.Errorf("%w: grant %s derives from %s, which does not exist", ErrIllegalMove, e.Grant, r.parent)
		}
		parent := l.get(p)
		if parent.stateName().Ended() {
			return fmt.Errorf("%w: grant %s derives from %s, which is %s", ErrIllegalMove, e.Grant, r.parent, parent.stateName())
		}
		if parent.depth == math.MaxUint16 {
			return fmt.Errorf("%w: grant %s is derived too deeply", ErrIllegalMove, e.Grant)
		}
		n.parent, n.depth = p, parent.depth+1
	}
	a := about{
		holder: e.VM, partition: e.Partition, instance: f.in.string(r.instance), actor: newActor(e.Actor),
		bootID: f.in.string(r.bootID), hasDeadline: r.hasDeadline, persist: r.persist, declared: r.declared,
		maxDepth: -1, maxUses: -1, decision: decision,
	}
	if v := r.limits.MaxDepth; v != nil {
		a.maxDepth = *v
	}
	if v := r.limits.MaxUses; v != nil {
		a.maxUses = *v
	}
	n.about = f.in.shared(a)
	l.add(n)
	return nil
}

func (f *folder) moved(l *layer, e *entry) error {
	i, ok := l.find(e.Grant)
	from := GrantState("")
	if ok {
		from = l.get(i).stateName()
	}
	d, err := read[Change](e)
	if err != nil {
		return err
	}
	m := Move{From: from, To: from} // degrading a grant leaves it where it is
	if e.Type != GrantDegraded {
		if m, err = move(from, e.Type); err != nil {
			return err
		}
	}
	if !ok {
		return fmt.Errorf("%w: %s of a grant that does not exist", ErrIllegalMove, e.Type)
	}
	n := l.mut(i)
	n.state = stateIndex(m.To)
	if m.Desired {
		n.generation++
	}
	if m.To.Final() {
		setKey(&l.ended, n.about.holder, struct{}{})
	}
	if d == (Change{}) && !m.Desired {
		return nil
	}
	next := note{}
	if n.note != nil {
		next = *n.note
	}
	if e.Type == GrantRevoking {
		next.revoking = e.Time.UnixNano()
	}
	if m.Desired {
		next.changed = e.Seq
	}
	switch {
	case e.Type == GrantDegraded:
		next.degraded = d.Reason
	case d.Reason != "":
		next.reason = d.Reason
	}
	if d.Instance != "" {
		next.instance = f.in.string([]byte(d.Instance))
	}
	n.note = &next
	return nil
}

func (f *folder) bound(l *layer, e *entry) error {
	d, err := read[BoundData](e)
	if err != nil {
		return err
	}
	v := l.vm(e.VM)
	if v.bound {
		return fmt.Errorf("%w: VM %s is bound to partition %s", ErrIllegalMove, e.VM, v.partition)
	}
	v.bound, v.partition = true, e.Partition
	setKey(&l.vms, e.VM, v)
	if d.Alias != "" {
		setKey(&l.aliases, aliasKey{e.Partition, d.Alias}, e.VM)
	}
	return nil
}

func (f *folder) ran(l *layer, e *entry) error {
	d, err := read[RunData](e)
	if err != nil {
		return err
	}
	v := l.vm(e.VM)
	if e.Type == VMStarted {
		v.running, v.instance = true, f.in.string([]byte(d.Instance))
	} else if v.instance == d.Instance || d.Instance == "" {
		v.running, v.instance = false, ""
	}
	v.changed = e.Seq
	setKey(&l.vms, e.VM, v)
	return nil
}

func (f *folder) named(l *layer, e *entry) error {
	d, err := read[NameData](e)
	if err != nil {
		return err
	}
	if e.Type == NameRemoved {
		if l.name(e.Partition) == "" {
			return fmt.Errorf("%w: partition %s has no name", ErrIllegalMove, e.Partition)
		}
		setKey(&l.names, e.Partition, "")
		return nil
	}
	if d.Name == "" {
		return fmt.Errorf("%w: an empty name", ErrInvalidEvent)
	}
	for partition, name := range l.allNames() {
		if name == d.Name && partition != e.Partition {
			return fmt.Errorf("%w: partition %s is named %q", ErrIllegalMove, partition, name)
		}
	}
	setKey(&l.names, e.Partition, d.Name)
	return nil
}

func (f *folder) clock(l *layer, e *entry) error {
	d, err := read[HighwaterData](e)
	if err != nil {
		return err
	}
	if !d.Wall.IsZero() {
		l.meta.highwater = max(l.meta.highwater, d.Wall.UnixNano())
		l.mark(d)
	}
	return nil
}
