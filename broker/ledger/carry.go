package ledger

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"github.com/google/uuid"
)

// What a segment begins with: everything that is in force, as it was when the
// segment before it went into an archive. It is in ledger.carried events, each of
// which holds items of one kind.
const (
	carriedVersion = 1
	// carriedBytes is at how many bytes an event of carried state is full.
	carriedBytes = 128 << 10
)

// carriedKind is a kind of item. Kinds are in the log: they are added to, never
// changed.
type carriedKind byte

const (
	carriedGrants  carriedKind = 1 + iota // ancestors before what derives from them
	carriedVMs                            // with their bindings and runs
	carriedAliases                        // of VMs whose id the ledger keeps
	carriedNames                          // of partitions
	carriedKeys                           // that sign, oldest first
	carriedSigned                         // grants with a token by another key than the current one
)

func (k carriedKind) String() string {
	return [...]string{"nothing", "grants", "vms", "aliases", "names", "keys", "signed"}[k]
}

// carriedData is what people read of a ledger.carried event.
type carriedData struct {
	Carries string `json:"carries"`
	Count   uint64 `json:"count"`
}

// carrier writes items, or reads them. One function for each kind says what an
// item has, so that what is written is what is read. Texts that were there before
// in the same event are written as their number.
type carrier struct {
	b     []byte
	known map[string]uint64

	d     *decoder // nil: it writes
	texts []carriedText
	in    *interner
}

type carriedText struct {
	s    string
	json bool // known to be
}

func (c *carrier) number(v *uint64) {
	if c.d == nil {
		c.b = binary.AppendUvarint(c.b, *v)
		return
	}
	*v = c.d.uvarint()
}

// signed takes eight bytes, as times do not get shorter.
func (c *carrier) signed(v *int64) {
	if c.d == nil {
		c.b = binary.BigEndian.AppendUint64(c.b, uint64(*v))
		return
	}
	*v = int64(c.d.uint64())
}

func (c *carrier) flag(v *bool) {
	n := uint64(0)
	if *v {
		n = 1
	}
	c.small(&n, 1)
	*v = n == 1
}

// small is a number of at most most.
func (c *carrier) small(v *uint64, most uint64) {
	c.number(v)
	if c.d != nil && *v > most {
		c.d.fail = true
		*v = 0
	}
}

// limit is a count, or -1.
func (c *carrier) limit(v *int) {
	n := uint64(*v + 1)
	c.small(&n, 1<<31+1)
	*v = int(n) - 1
}

// at is the number of a text, the first of which is 1; 0 is none.
func (c *carrier) at(s string) (at uint64) {
	if c.d == nil {
		if s == "" {
			c.b = append(c.b, 0)
			return 0
		}
		at, ok := c.known[s]
		if !ok {
			at = uint64(len(c.known) + 1)
			c.known[s] = at
		}
		c.b = binary.AppendUvarint(c.b, at)
		if !ok {
			c.b = appendBytes(c.b, s)
		}
		return at
	}
	if at = c.d.uvarint(); at != uint64(len(c.texts)+1) {
		if at > uint64(len(c.texts)) {
			c.d.fail = true
			return 0
		}
		return at
	}
	text := c.in.string(c.d.bytes())
	if _, twice := c.known[text]; twice || text == "" {
		c.d.fail = true
		return 0
	}
	c.known[text] = at
	c.texts = append(c.texts, carriedText{s: text})
	return at
}

func (c *carrier) text(v *string) {
	at := c.at(*v)
	if c.d == nil {
		return
	}
	if *v = ""; at > 0 {
		*v = c.texts[at-1].s
	}
}

// perhaps is a text that may be missing, which is not the same as empty.
func (c *carrier) perhaps(v **string) {
	there, s := *v != nil, ""
	if there {
		s = **v
	}
	if c.flag(&there); there {
		c.text(&s)
	}
	if c.d == nil {
		return
	}
	if *v = nil; there {
		*v = &s
	}
}

// document is a text that is JSON, or nothing.
func (c *carrier) document(v *string) {
	at := c.at(*v)
	if c.d == nil {
		return
	}
	if *v = ""; at == 0 {
		return
	}
	t := &c.texts[at-1]
	if t.json = t.json || json.Valid([]byte(t.s)); !t.json {
		c.d.fail = true
	}
	*v = t.s
}

// shared is an id that others have too.
func (c *carrier) shared(v *uuid.UUID) {
	s := ""
	if *v != uuid.Nil {
		s = string(v[:])
	}
	if c.text(&s); c.d == nil {
		return
	}
	*v = uuid.Nil
	switch len(s) {
	case 0:
	case len(v):
		copy(v[:], s)
	default:
		c.d.fail = true
	}
}

// own is an id that only this item has.
func (c *carrier) own(v *uuid.UUID) {
	if c.d == nil {
		c.b = append(c.b, v[:]...)
		return
	}
	c.d.id(v, true)
}

// carriedGrant is all that is known of a grant, its parent by id, without what
// links it to others in memory.
type carriedGrant struct {
	node
	about      about
	note       note
	usage      usage
	parent     uuid.UUID
	capability string
	resource   uuid.UUID
	hasOwner   bool
}

func (c *carrier) grant(g *carriedGrant) {
	c.own(&g.id)
	c.shared(&g.parent)
	c.text(&g.label)
	c.number(&g.seq)
	c.signed(&g.created)
	c.signed(&g.wall)
	c.signed(&g.boot)
	generation, state := uint64(g.generation), uint64(g.state)
	c.small(&generation, math.MaxUint32)
	c.small(&state, uint64(len(stateNames)-1))
	g.generation, g.state = uint32(generation), uint8(state)

	c.document(&g.capability)
	c.shared(&g.resource)
	c.flag(&g.hasOwner)

	a := &g.about
	c.shared(&a.holder)
	c.shared(&a.partition)
	c.text(&a.instance)
	c.text(&a.actor.kind)
	c.signed(&a.actor.uid)
	c.shared(&a.actor.vm)
	pid := uint64(a.actor.pid)
	c.small(&pid, 1<<31)
	a.actor.pid = int(pid)
	c.text(&a.bootID)
	c.flag(&a.hasDeadline)
	c.flag(&a.persist)
	c.flag(&a.declared)
	c.limit(&a.maxDepth)
	c.limit(&a.maxUses)
	c.document(&a.decision)

	o := &g.note
	c.text(&o.reason)
	c.text(&o.degraded)
	c.text(&o.instance)
	c.signed(&o.renewed)
	c.signed(&o.revoking)
	c.number(&o.changed)
	c.perhaps(&o.troubled)

	uses := uint64(g.usage.count)
	c.small(&uses, math.MaxUint32)
	g.usage.count = uint32(uses)
	c.text(&g.usage.run)
}

func (c *carrier) vm(id *uuid.UUID, v *vmInfo) {
	c.own(id)
	c.flag(&v.bound)
	c.shared(&v.partition)
	c.flag(&v.running)
	c.text(&v.instance)
	c.number(&v.changed)
}

func (c *carrier) alias(k *aliasKey, vm *uuid.UUID) {
	c.shared(&k.partition)
	c.text(&k.alias)
	c.own(vm)
}

func (c *carrier) name(partition *uuid.UUID, name *string) {
	c.own(partition)
	c.text(name)
}

func (c *carrier) key(k *signingKey) {
	c.text(&k.kid)
	c.text(&k.public)
	c.number(&k.epoch)
	c.number(&k.from)
	c.number(&k.until)
	c.signed(&k.created)
	c.signed(&k.retired)
	c.signed(&k.revoked)
	c.text(&k.reason)
}

func (c *carrier) signature(grant *uuid.UUID, kid *string) {
	c.own(grant)
	c.text(kid)
}

// carrying collects items into events.
type carrying struct {
	kind  carriedKind
	count uint64
	c     carrier
	full  [][]byte
}

func (w *carrying) begin(kind carriedKind) {
	w.end()
	w.kind, w.count, w.c = kind, 0, carrier{known: map[string]uint64{}}
}

func (w *carrying) end() {
	if w.count == 0 {
		return
	}
	head := []byte{carriedVersion, byte(w.kind)}
	head = binary.AppendUvarint(head, w.count)
	w.full = append(w.full, append(head, w.c.b...))
	w.count = 0
}

func (w *carrying) item(put func(c *carrier)) {
	if len(w.c.b) >= carriedBytes {
		w.begin(w.kind)
	}
	put(&w.c)
	w.count++
}

// inForce are the nodes that a segment begins with, oldest first: what is not
// final, and what that derives from.
func (l *layer) inForce() []int32 {
	seen := map[int32]bool{}
	var out []int32
	for _, i := range l.open(uuid.Nil) {
		for ; i != none && !seen[i]; i = l.get(i).parent {
			seen[i] = true
			out = append(out, i)
		}
	}
	slices.Sort(out)
	return out
}

// carried is what is in force in a committed layer, as the data of events. Layers
// that say the same have the same.
func (l *layer) carried() [][]byte {
	w := &carrying{}
	w.begin(carriedGrants)
	nodes := l.inForce()
	for _, i := range nodes {
		n := l.get(i)
		g := carriedGrant{
			node: *n, about: *n.about, usage: l.usage(i),
			capability: n.capability.json, resource: n.capability.resource, hasOwner: n.capability.hasOwner,
		}
		if n.note != nil {
			g.note = *n.note
		}
		if n.parent != none {
			g.parent = l.get(n.parent).id
		}
		w.item(func(c *carrier) { c.grant(&g) })
	}
	w.begin(carriedVMs)
	for _, id := range sortedKeys(l.vms, compareIDs) {
		v := l.vms[id]
		w.item(func(c *carrier) { c.vm(&id, &v) })
	}
	w.begin(carriedAliases)
	for _, k := range sortedKeys(l.aliases, func(x, y aliasKey) int {
		if n := compareIDs(x.partition, y.partition); n != 0 {
			return n
		}
		return slices.Compare([]byte(x.alias), []byte(y.alias))
	}) {
		vm := l.aliases[k]
		w.item(func(c *carrier) { c.alias(&k, &vm) })
	}
	w.begin(carriedNames)
	for _, id := range sortedKeys(l.names, compareIDs) {
		name := l.names[id]
		if name == "" {
			continue // was taken away
		}
		w.item(func(c *carrier) { c.name(&id, &name) })
	}
	w.begin(carriedKeys)
	for _, k := range l.meta.keys {
		w.item(func(c *carrier) { c.key(&k) })
	}
	w.begin(carriedSigned)
	for _, s := range sortedKeys(l.signed, func(x, y signedBy) int {
		return cmp.Or(cmp.Compare(x.node, y.node), cmp.Compare(x.kid, y.kid))
	}) {
		if _, carried := slices.BinarySearch(nodes, s.node); carried {
			id := l.get(s.node).id
			w.item(func(c *carrier) { c.signature(&id, &s.kid) })
		}
	}
	w.end()
	return w.full
}

func compareIDs(x, y uuid.UUID) int { return slices.Compare(x[:], y[:]) }

func sortedKeys[K comparable, V any](m map[K]V, cmp func(x, y K) int) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, cmp)
	return keys
}

// carriedHead reads what every event of carried state begins with.
func carriedHead(d *decoder) (kind carriedKind, count uint64, err error) {
	version := d.byte()
	kind = carriedKind(d.byte())
	count = d.uvarint()
	if d.fail || version != carriedVersion || kind < carriedGrants || kind > carriedSigned || count == 0 {
		return 0, 0, fmt.Errorf("%w: carried state of version %d and kind %d", errRecord, version, kind)
	}
	return kind, count, nil
}

// carried puts in what a segment begins with.
func (f *folder) carried(l *layer, e *entry) error {
	d := &decoder{b: e.data}
	kind, count, err := carriedHead(d)
	if err != nil {
		return err
	}
	c := &carrier{d: d, known: map[string]uint64{}, in: f.in}
	for range count {
		switch kind {
		case carriedGrants:
			err = f.carriedGrant(l, c)
		case carriedVMs:
			var id uuid.UUID
			var v vmInfo
			c.vm(&id, &v)
			setKey(&l.vms, id, v)
		case carriedAliases:
			var k aliasKey
			var vm uuid.UUID
			c.alias(&k, &vm)
			setKey(&l.aliases, k, vm)
		case carriedNames:
			var partition uuid.UUID
			var name string
			c.name(&partition, &name)
			setKey(&l.names, partition, name)
		case carriedKeys:
			var k signingKey
			c.key(&k)
			l.meta.keys = append(l.meta.keys, k)
		case carriedSigned:
			var grant uuid.UUID
			var kid string
			c.signature(&grant, &kid)
			i, ok := l.find(grant)
			if !ok {
				return fmt.Errorf("%w: a token of grant %s, which is not carried", ErrIllegalMove, grant)
			}
			setKey(&l.signed, signedBy{i, kid}, struct{}{})
		}
		if err != nil {
			return err
		}
		if d.fail {
			return d.end()
		}
	}
	return d.end()
}

func (f *folder) carriedGrant(l *layer, c *carrier) error {
	var g carriedGrant
	c.grant(&g)
	if c.d.fail {
		return c.d.end()
	}
	n := g.node
	n.parent, n.firstChild, n.nextSibling, n.nextHeld = none, none, none, none
	if _, exists := l.find(n.id); exists || n.state == 0 || n.generation == 0 || g.about.holder == uuid.Nil || g.capability == "" {
		return fmt.Errorf("%w: grant %s is carried twice, or has no state, holder or capability", ErrIllegalMove, n.id)
	}
	if g.parent != uuid.Nil {
		p, ok := l.find(g.parent)
		if !ok {
			return fmt.Errorf("%w: grant %s derives from %s, which is not carried", ErrIllegalMove, n.id, g.parent)
		}
		n.parent, n.depth = p, l.get(p).depth+1
	}
	stored, ok := f.in.capabilities[g.capability]
	if !ok {
		stored = f.in.capability(&request{capability: []byte(g.capability), resource: g.resource, hasResource: g.hasOwner})
	}
	if stored.resource != g.resource || stored.hasOwner != g.hasOwner {
		return fmt.Errorf("%w: grant %s has another's resource", ErrIllegalMove, n.id)
	}
	n.capability, n.about = stored, f.in.shared(g.about)
	if o := g.note; o != (note{}) {
		n.note = &o
	}
	i := l.len()
	l.add(n)
	if g.usage != (usage{}) {
		setKey(&l.used, i, g.usage)
	}
	if n.stateName().Final() {
		setKey(&l.ended, g.about.holder, struct{}{})
	}
	return nil
}

// summary is what people read of carried state.
func summary(data []byte) (json.RawMessage, error) {
	kind, count, err := carriedHead(&decoder{b: data})
	if err != nil {
		return nil, err
	}
	return mustJSON(carriedData{Carries: kind.String(), Count: count}), nil
}
