package ledger

import (
	"encoding/json"
	"slices"
	"sync/atomic"

	"github.com/google/uuid"
	"spectrum-os.org/broker/capabilities"
)

// none is the end of a list of nodes.
const none = -1

// node is what a grant costs in memory. What many grants share is interned
// behind about and capability.
type node struct {
	id         uuid.UUID
	about      *about
	capability *storedCapability
	note       *note // nil until a move says something
	label      string
	seq        uint64
	created    int64 // nanoseconds since 1970
	wall       int64 // the deadline, where about.hasDeadline
	boot       int64

	parent, firstChild, nextSibling, nextHeld int32
	generation                                uint32
	depth                                     uint16
	state                                     uint8 // index into stateNames
}

// about is the part of a grant that its siblings tend to have in common.
type about struct {
	holder, partition uuid.UUID
	instance          string
	actor             actor
	bootID            string
	hasDeadline       bool
	persist, declared bool
	maxDepth, maxUses int // -1: unlimited
	decision          string
}

// actor is a comparable Actor.
type actor struct {
	kind string
	uid  int64 // -1: none
	vm   uuid.UUID
	pid  int
}

// note is what moves leave behind beside the state. It is replaced, never
// changed, since layers share it.
type note struct {
	reason, degraded, instance string
	renewed                    int64 // nanoseconds since 1970; 0: never
	revoking                   int64 // when it was revoked, in nanoseconds since 1970

	troubled *string // nil: not
	changed  uint64  // the event that last changed what should exist; 0: the first one
}

// storedCapability is a capability as it was recorded. It is decoded when it
// is first asked for: a million of them need not be when the ledger opens.
type storedCapability struct {
	json     string
	resource uuid.UUID
	hasOwner bool
	decoded  atomic.Pointer[capabilities.Capability]
}

var stateNames = [...]GrantState{"", Pending, Active, Revoking, Revoked, Failed}

func stateIndex(s GrantState) uint8 {
	for i, n := range stateNames {
		if n == s {
			return uint8(i)
		}
	}
	return 0
}

func (n *node) stateName() GrantState { return stateNames[n.state] }

func (n *node) deadline() capabilities.Deadline {
	if !n.about.hasDeadline {
		return capabilities.Deadline{}
	}
	return capabilities.Deadline{Wall: nanoTime(n.wall), BootID: n.about.bootID, Boot: nanoDuration(n.boot)}
}

func (n *node) instance() string {
	if n.note != nil && n.note.instance != "" {
		return n.note.instance
	}
	return n.about.instance
}

// Bounds of what the interner remembers. Beyond them it forgets all and
// starts again: grants made at about the same time are those that share, and
// what no grant uses must not stay.
const (
	maxInterned      = 1 << 14
	maxInternedBytes = 4 << 20
)

// interner keeps one copy of what grants have in common. Only the goroutine
// that folds uses it; what it hands out never changes.
type interner struct {
	strings      pool
	documents    pool // JSON
	about        map[about]*about
	capabilities map[string]*storedCapability
}

func newInterner() *interner {
	return &interner{about: map[about]*about{}, capabilities: map[string]*storedCapability{}}
}

// pool is a set of strings.
type pool struct {
	bytes int
	known map[string]string
}

func (p *pool) add(b []byte) string {
	if p.known == nil || len(p.known) >= maxInterned || p.bytes >= maxInternedBytes {
		p.known, p.bytes = map[string]string{}, 0
	}
	s := string(b)
	p.known[s] = s
	p.bytes += len(s)
	return s
}

func (in *interner) string(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	if s, ok := in.strings.known[string(b)]; ok {
		return s
	}
	return in.strings.add(b)
}

// json is a JSON value, or nothing; false where it is neither.
func (in *interner) json(b []byte) (string, bool) {
	if len(b) == 0 {
		return "", true
	}
	if s, ok := in.documents.known[string(b)]; ok {
		return s, true
	}
	if !json.Valid(b) {
		return "", false
	}
	return in.documents.add(b), true
}

// capability is nil where it is not JSON.
func (in *interner) capability(r *request) *storedCapability {
	if c, ok := in.capabilities[string(r.capability)]; ok {
		return c
	}
	if !json.Valid(r.capability) {
		return nil
	}
	if len(in.capabilities) >= maxInterned {
		in.capabilities = map[string]*storedCapability{}
	}
	c := &storedCapability{json: string(r.capability), resource: r.resource, hasOwner: r.hasResource}
	in.capabilities[c.json] = c
	return c
}

func (in *interner) shared(a about) *about {
	if p, ok := in.about[a]; ok {
		return p
	}
	if len(in.about) >= maxInterned {
		in.about = map[about]*about{}
	}
	in.about[a] = &a
	return &a
}

// vmInfo is what the ledger knows of a VM.
type vmInfo struct {
	bound     bool
	partition uuid.UUID
	running   bool
	instance  string
	changed   uint64 // the event that last began or ended a run
}

type aliasKey struct {
	partition uuid.UUID
	alias     string
}

// meta is the small part of the state, copied from layer to layer.
type meta struct {
	seq    uint64
	hash   Hash
	ledger uuid.UUID
	epoch  uint64
	// highwater is the latest wall time on record, and boot this boot's time
	// when it was reached, or when the ledger was opened.
	highwater, boot int64
	anchor          anchor
	// keys are replaced, never changed, since layers share them; keysSeq is the
	// event that did so last.
	keys    []signingKey
	keysSeq uint64
	// segment is what the log in the file begins with, and carrying how many events
	// of carried state are still to come.
	segment  segment
	carrying int
}

// layer is the state, or a change to the layer below it that can be merged
// into that or forgotten. The bottom layer is what is committed; readers see
// only that, while the writer works on the layers above it.
type layer struct {
	below *layer
	base  int32 // nodes in the layers below
	table nodeTable
	meta  meta

	changed map[int32]*node // copies of nodes of the layers below
	used    map[int32]usage // of nodes that were used, where uses are counted
	ids     map[uuid.UUID]int32
	held    map[uuid.UUID]int32    // a holder's newest grant that is not final
	ended   map[uuid.UUID]struct{} // holders of what became final and is in their list
	vms     map[uuid.UUID]vmInfo
	aliases map[aliasKey]uuid.UUID
	names   map[uuid.UUID]string // "" where a layer takes a name away
	signed  map[signedBy]struct{}

	due *deadlines // bottom only
}

// setKey sets m[k], and makes m first: most layers change little, and have few of
// their maps.
func setKey[K comparable, V any](m *map[K]V, k K, v V) {
	if *m == nil {
		*m = map[K]V{}
	}
	(*m)[k] = v
}

func newLayer(below *layer) *layer {
	l := &layer{below: below}
	if below != nil {
		l.base = below.len()
		l.meta = below.meta
	}
	return l
}

// nodeTable is a list of nodes that grows without copying them all.
type nodeTable struct {
	pages [][]node
	n     int32
}

const pageNodes = 1024

func (t *nodeTable) add(n node) {
	if t.n%pageNodes == 0 {
		size := 1
		if t.n > 0 {
			size = pageNodes
		}
		t.pages = append(t.pages, make([]node, 0, size))
	}
	p := &t.pages[len(t.pages)-1]
	if len(*p) == cap(*p) {
		// Only the first page starts small, for the many layers of one grant.
		grown := make([]node, len(*p), min(pageNodes, 8*cap(*p)))
		copy(grown, *p)
		*p = grown
	}
	*p = append(*p, n)
	t.n++
}

func (t *nodeTable) at(i int32) *node { return &t.pages[i/pageNodes][i%pageNodes] }

func (l *layer) len() int32 { return l.base + l.table.n }

// get is node i as this layer sees it, to be read.
func (l *layer) get(i int32) *node {
	for ; ; l = l.below {
		if i >= l.base {
			return l.table.at(i - l.base)
		}
		if n, ok := l.changed[i]; ok {
			return n
		}
	}
}

// mut is node i to be changed in this layer.
func (l *layer) mut(i int32) *node {
	if i >= l.base {
		return l.table.at(i - l.base)
	}
	if n, ok := l.changed[i]; ok {
		return n
	}
	n := *l.get(i)
	setKey(&l.changed, i, &n)
	return &n
}

func (l *layer) find(id uuid.UUID) (int32, bool) {
	for ; l != nil; l = l.below {
		if i, ok := l.ids[id]; ok {
			return i, true
		}
	}
	return none, false
}

func (l *layer) newestHeld(holder uuid.UUID) int32 {
	for ; l != nil; l = l.below {
		if i, ok := l.held[holder]; ok {
			return i
		}
	}
	return none
}

func (l *layer) vm(id uuid.UUID) vmInfo {
	for ; l != nil; l = l.below {
		if v, ok := l.vms[id]; ok {
			return v
		}
	}
	return vmInfo{}
}

func (l *layer) alias(k aliasKey) (uuid.UUID, bool) {
	for ; l != nil; l = l.below {
		if id, ok := l.aliases[k]; ok {
			return id, true
		}
	}
	return uuid.Nil, false
}

func (l *layer) name(partition uuid.UUID) string {
	for ; l != nil; l = l.below {
		if n, ok := l.names[partition]; ok {
			return n
		}
	}
	return ""
}

// allNames is a new map.
func (l *layer) allNames() map[uuid.UUID]string {
	out := map[uuid.UUID]string{}
	var add func(l *layer)
	add = func(l *layer) {
		if l.below != nil {
			add(l.below)
		}
		for k, v := range l.names {
			if v == "" {
				delete(out, k)
			} else {
				out[k] = v
			}
		}
	}
	add(l)
	return out
}

// open are the nodes that are not final, oldest first: a holder's, or with the nil
// UUID everybody's. It costs what is open, not what ever was.
func (l *layer) open(holder uuid.UUID) []int32 {
	var out []int32
	l.eachOpen(holder, func(i int32, _ *node) bool {
		out = append(out, i)
		return true
	})
	slices.Sort(out)
	return out
}

// eachOpen calls fn with the same nodes, in no order, until it says no.
func (l *layer) eachOpen(holder uuid.UUID, fn func(i int32, n *node) bool) {
	walk := func(i int32) bool {
		for i != none {
			n := l.get(i)
			if !n.stateName().Final() && !fn(i, n) {
				return false
			}
			i = n.nextHeld
		}
		return true
	}
	if holder != uuid.Nil {
		walk(l.newestHeld(holder))
		return
	}
	for h := range l.holders() {
		if !walk(l.newestHeld(h)) {
			return
		}
	}
}

// holders are those who have, or lately had, a grant that is not final.
func (l *layer) holders() map[uuid.UUID]struct{} {
	out := map[uuid.UUID]struct{}{}
	for at := l; at != nil; at = at.below {
		for h := range at.held {
			out[h] = struct{}{}
		}
	}
	return out
}

// unlink takes what became final out of its holder's list. Only the bottom layer
// does: those above it may be forgotten.
func (l *layer) unlink() {
	for holder := range l.ended {
		l.unlinkFrom(holder)
	}
	clear(l.ended)
}

func (l *layer) unlinkFrom(holder uuid.UUID) {
	next := func(i int32) int32 {
		for i != none && l.get(i).stateName().Final() {
			i = l.get(i).nextHeld
		}
		return i
	}
	first := next(l.newestHeld(holder))
	if first == none {
		delete(l.held, holder)
		return
	}
	l.held[holder] = first
	for i := first; i != none; i = l.get(i).nextHeld {
		l.mut(i).nextHeld = next(l.get(i).nextHeld)
	}
}

// add puts in a new node and links it to its parent and its holder.
func (l *layer) add(n node) {
	i := l.len()
	n.nextHeld = l.newestHeld(n.about.holder)
	n.nextSibling = none
	if n.parent != none {
		p := l.mut(n.parent)
		n.nextSibling = p.firstChild
		p.firstChild = i
	}
	l.place(i, n)
}

// place puts in a node that is linked already.
func (l *layer) place(i int32, n node) {
	l.table.add(n)
	setKey(&l.ids, n.id, i)
	setKey(&l.held, n.about.holder, i)
	if l.due != nil {
		l.due.add(i, l.table.at(i-l.base))
	}
}

// merge makes the layer's changes those of the layer below.
func (l *layer) merge() {
	to := l.below
	for i, n := range l.changed {
		old := to.mut(i)
		renewed := to.due != nil && old.deadline() != n.deadline()
		*old = *n
		if renewed {
			to.due.moved(i, old)
		}
	}
	for i := range l.table.n {
		to.place(l.base+i, *l.table.at(i))
	}
	for i, u := range l.used {
		setKey(&to.used, i, u)
	}
	for holder := range l.ended {
		setKey(&to.ended, holder, struct{}{})
	}
	for k, v := range l.vms {
		setKey(&to.vms, k, v)
	}
	for k, v := range l.aliases {
		setKey(&to.aliases, k, v)
	}
	for k, v := range l.names {
		if v == "" && to.below == nil {
			delete(to.names, k)
			continue
		}
		setKey(&to.names, k, v)
	}
	for k := range l.signed {
		setKey(&to.signed, k, struct{}{})
	}
	to.meta = l.meta
	if to.below == nil {
		to.unlink()
	}
	if to.due != nil {
		to.due.prune(to)
	}
}
