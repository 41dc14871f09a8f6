package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"golang.org/x/text/unicode/norm"

	"spectrum-os.org/broker/agents/wire"
	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/failpoint"
	"spectrum-os.org/broker/policy"
)

// request is a request for a capability, authenticated and resolved.
type request struct {
	action     string
	actor      ledger.Actor
	holder     uuid.UUID
	capability capabilities.Capability
	ttl        *int64 // seconds; nil: until the holder's exit
	label      string // empty: chosen from the resource
	persist    bool
	declared   bool
	parent     *ledger.Grant
	renews     uuid.UUID     // the grant whose deadline it is to move
	limits     ledger.Limits // asked for; nil members: as many as the parent and policy allow
	// run is the run of the holder that the request is for. Empty: the one that
	// it is in when the request is looked at.
	run string
	// at is when it was made, where that is not now.
	at time.Time
	// narrower accepts less than was asked for.
	narrower bool
}

// decided is a request that policy has spoken on.
type decided struct {
	request
	verdict    policy.Verdict
	capability capabilities.Capability // what is granted: asked for, narrowed
	ttl        *int64
	limits     ledger.Limits
	narrowed   bool
}

// labelKey is a label in a VM.
type labelKey struct {
	vm    uuid.UUID
	label string
}

// maxTTL keeps a deadline within what the clocks can express.
const maxTTL = math.MaxInt64 / int64(time.Second) / 2

// decide checks a request against its parent and asks policy. Its error says
// why the request is refused; with explain the verdict is returned all the
// same, with every rule that had a say.
func (b *Broker) decide(ctx context.Context, r request, explain bool) (decided, error) {
	r.action = actionOf(r.action, r.parent, r.holder)
	d := decided{request: r, capability: r.capability, ttl: r.ttl, limits: r.limits}
	if r.ttl != nil && (*r.ttl <= 0 || *r.ttl > maxTTL) {
		return d, api.Errorf(api.CodeInvalid, "a lifetime of %d seconds is not between 1 and %d", *r.ttl, maxTTL)
	}
	if !b.reconciler.Knows(r.capability.Kind) {
		return d, api.Errorf(api.CodeInvalid, "this broker cannot apply capabilities of kind %q", r.capability.Kind)
	}
	if err := b.checkLimits(r); err != nil {
		return d, err
	}
	if err := b.checkParent(r); err != nil {
		return d, err
	}
	d.verdict = b.ask(ctx, r, explain)
	if err := refusal(d.verdict); err != nil {
		return d, err
	}
	return d, b.narrow(&d)
}

// ask puts the request to the engines concerned: those of the partitions of
// the requester, the holder, the parent's holder and the resource. The host's is asked always, and
// concerned where one of these belongs to no partition.
func (b *Broker) ask(ctx context.Context, r request, explain bool) policy.Verdict {
	var ids []policy.EngineID
	concern := func(partition uuid.UUID, ok bool) {
		id := policy.HostEngine
		if ok && partition != uuid.Nil {
			id = policy.PartitionEngine(partition)
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	var holderPartition uuid.UUID
	b.ledger.View(func(s *ledger.State) {
		switch r.actor.Kind {
		case ledger.ActorVM:
			concern(s.Binding(r.actor.VM))
		case ledger.ActorPerson:
			concern(uuid.Nil, false)
		}
		holderPartition, _ = s.Binding(r.holder)
		concern(holderPartition, true)
		if r.parent != nil {
			// Whose grant is passed on has a say in it, whoever asks.
			concern(s.Binding(r.parent.Holder))
		}
	})
	concern(r.capability.Resource.Partition())
	b.awaitFirstLoads(ctx, ids...)
	if r.at.IsZero() {
		r.at = b.o.Clock.Now().Wall
	}
	in := policy.Input{
		Action: r.action, Now: hostTime(r.at),
		Requester:  policy.Requester{Kind: policy.RequesterPerson, UID: r.actor.UID},
		Holder:     policy.Holder{VM: r.holder, Ancestors: []uuid.UUID{}},
		Capability: policyCapability(r.capability, r.ttl),
	}
	if r.actor.Kind != ledger.ActorPerson {
		// A definition speaks for the VM that it describes.
		in.Requester = policy.Requester{Kind: policy.RequesterVM, VM: &r.actor.VM}
	}
	if holderPartition != uuid.Nil {
		in.Holder.Partition = &holderPartition
	}
	if def, ok := b.inv().definitions[r.holder]; ok {
		in.Holder.Own = &policy.Own{Names: def.Aliases, Labels: def.Labels}
	}
	if r.parent != nil {
		p := policyCapability(r.parent.Capability, nil)
		in.Parent = &p
	}
	v := b.engines.Decide(ctx, ids, func(policy.EngineID) policy.Input { return in }, explain)
	for i := range v.Answers {
		// Names may have changed since the engine was loaded.
		v.Answers[i].Name = b.engineName(v.Answers[i].Engine)
	}
	return v
}

// hostTime is a time as policies see it: on the host's wall, in its zone.
func hostTime(wall time.Time) time.Time { return wall.Local().Truncate(time.Second) }

func policyCapability(c capabilities.Capability, ttl *int64) policy.Capability {
	resource, err := json.Marshal(c.Resource)
	if err != nil {
		resource = nil // policies then see no resource, and their lookups fail closed
	}
	return policy.Capability{Kind: c.Kind, Resource: resource, Rights: c.Rights, TTLSeconds: ttl}
}

// refusal is the error for a verdict that is not a plain yes.
func refusal(v policy.Verdict) error {
	if v.Outcome == policy.Allow {
		return nil
	}
	code := api.CodeDenied
	if slices.ContainsFunc(v.Answers, func(a policy.Answer) bool { return a.Outcome == policy.Error }) {
		code = api.CodePolicyError
	}
	e := api.Errorf(code, "%s", v.Summary())
	said := apiVerdict(v)
	e.Verdict = &said
	return e
}

// grant decides a request and records the outcome. What it returns is durable
// and not yet applied.
func (b *Broker) grant(ctx context.Context, r request) (ledger.Grant, error) {
	began := time.Now()
	r.action = actionOf(r.action, r.parent, r.holder)
	instance := ""
	u := b.unit(r.holder)
	if u != nil {
		instance = u.instance()
	}
	if u == nil && !r.persist {
		return ledger.Grant{}, b.recordDenial(ctx, decided{request: r}, api.Errorf(api.CodeConflict,
			"VM %s does not run; start it first, or ask for a grant that persists", b.vmName(r.holder)))
	}
	if r.run != "" && r.run != instance {
		return ledger.Grant{}, b.recordDenial(ctx, decided{request: r}, errRunOver(b.vmName(r.holder)))
	}
	d, err := b.decide(ctx, r, false)
	b.metrics.decided(d.verdict, time.Since(began))
	if err != nil {
		return ledger.Grant{}, b.recordDenial(ctx, d, err)
	}
	// A path that is not there, or leads out of the partition, is refused
	// before there is a grant. Only whom policy lets learn of it is told.
	if err := b.reconciler.Check(ctx, d.capability); err != nil {
		return ledger.Grant{}, b.recordDenial(ctx, d, api.Errorf(api.CodeInvalid, "cannot grant %s: %w", b.spoken(d.capability), err))
	}
	label, release, err := b.takeLabel(d)
	if err != nil {
		return ledger.Grant{}, b.recordDenial(ctx, d, err)
	}
	defer release()
	failpoint.Hit("request.decided")
	return b.record(ctx, d, instance, label)
}

// errRunOver refuses what was asked for a run of a VM that is over.
func errRunOver(vm string) error {
	return api.Errorf(api.CodeConflict, "VM %s ended or restarted meanwhile", vm)
}

// recordedDecision is what the ledger keeps of the decision behind a grant.
type recordedDecision struct {
	Narrowed bool        `json:"narrowed,omitempty"`
	Verdict  api.Verdict `json:"verdict"`
}

// Bounds of what is recorded of one engine's reasons: a policy that says much must
// not fill the ledger, nor make an event that is too large to be recorded.
const (
	maxRecordedReasons = 8
	maxRecordedText    = 512 // bytes
)

// recordedVerdict is a verdict for the ledger.
func recordedVerdict(v policy.Verdict) api.Verdict {
	out := apiVerdict(v)
	out.Summary = clip(out.Summary)
	for i := range out.Answers {
		reasons := out.Answers[i].Reasons
		if more := len(reasons) - maxRecordedReasons; more > 0 {
			reasons = append(reasons[:maxRecordedReasons], api.Reason{Text: fmt.Sprintf("and %d more", more)})
			out.Answers[i].Reasons = reasons
		}
		for j := range reasons {
			reasons[j].Text = clip(reasons[j].Text)
		}
	}
	return out
}

// clip cuts a text that a policy made.
func clip(s string) string {
	if len(s) <= maxRecordedText {
		return s
	}
	return strings.ToValidUTF8(s[:maxRecordedText], "") + "…"
}

func (b *Broker) record(ctx context.Context, d decided, instance, label string) (ledger.Grant, error) {
	id := uuid.New()
	decision, err := json.Marshal(recordedDecision{Narrowed: d.narrowed, Verdict: recordedVerdict(d.verdict)})
	if err != nil {
		return ledger.Grant{}, fmt.Errorf("cannot encode the decision: %w", err)
	}
	name := b.vmName(d.holder)
	var g ledger.Grant
	b.reopening.RLock()
	_, err = b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		s := tx.State()
		now := tx.Now()
		// The run may have ended while policy was thinking, and with it
		// whatever was there to end this grant.
		if run, on := s.Running(d.holder); !d.persist && (!on || run != instance) {
			return errRunOver(name)
		}
		if err := b.tooManyFrom(s, d.actor, d.holder); err != nil {
			return err
		}
		if live := inForce(s, d.holder, now); live >= b.o.MaxGrants {
			return api.Errorf(api.CodeNoSlots, "VM %s holds %d grants already, as many as one VM may", d.holder, live)
		}
		record := ledger.GrantRecord{
			Instance: instance, Capability: d.capability, Label: label, Persist: d.persist,
			Declared: d.declared, Decision: decision, Limits: d.limits,
		}
		if d.ttl != nil {
			record.Deadline = capabilities.NewDeadline(now, time.Duration(*d.ttl)*time.Second)
		}
		if d.parent != nil {
			// It may have ended while policy was thinking.
			if err := s.Usable(d.parent.ID, now); err != nil {
				return api.Errorf(api.CodeDenied, "the parent is not in force: %w", err)
			}
			record.Parent = d.parent.ID
			record.Deadline = capabilities.Earliest(now, record.Deadline, d.parent.Deadline)
		}
		partition, _ := s.Binding(d.holder)
		if err := tx.Append(ledger.NewGrant(d.actor, id, d.holder, partition, record)); err != nil {
			return err
		}
		g, _ = s.Grant(id)
		return nil
	})
	b.disown(id, err)
	b.reopening.RUnlock()
	if err != nil {
		if _, ok := errors.AsType[*api.Error](err); ok {
			return ledger.Grant{}, b.recordDenial(ctx, d, err)
		}
		return ledger.Grant{}, unrecorded("nothing is granted", err)
	}
	failpoint.Hit("request.recorded")
	// Of a VM that does not run nothing can be made true; its start wakes it.
	if b.unit(d.holder) != nil {
		b.reconciler.Wake(d.holder)
	}
	return g, nil
}

var liveStates = []ledger.GrantState{ledger.Pending, ledger.Active}

// deniedData is the Data of grant.denied.
type deniedData struct {
	Action     string                  `json:"action"`
	Capability capabilities.Capability `json:"capability"`
	Spelling   string                  `json:"spelling"` // as it was spoken at the time
	TTLSeconds *int64                  `json:"ttl_seconds,omitempty"`
	Reason     string                  `json:"reason"`
	Decision   *api.Verdict            `json:"decision,omitempty"`
}

// recordDenial puts a refusal on record and returns it. A refusal that cannot
// be recorded is one all the same.
func (b *Broker) recordDenial(ctx context.Context, d decided, refusal error) error {
	data := deniedData{Action: d.action, Capability: d.request.capability, Spelling: b.spoken(d.request.capability), TTLSeconds: d.request.ttl, Reason: clip(refusal.Error())}
	if d.renews != uuid.Nil {
		data.Action = actionRenew
	}
	if len(d.verdict.Answers) > 0 {
		v := recordedVerdict(d.verdict)
		data.Decision = &v
	}
	_, err := b.ledger.Update(context.WithoutCancel(ctx), func(tx *ledger.Tx) error {
		partition, _ := tx.State().Binding(d.holder)
		return tx.Append(ledger.Event{
			Type: ledger.GrantDenied, Actor: d.actor, Grant: d.renews, VM: d.holder, Partition: partition, Data: ledger.JSON(data),
		})
	})
	if err != nil {
		b.log.Error("cannot record a refusal", "vm", d.holder, "refusal", refusal, "err", err)
	}
	return refusal
}

// takeLabel reserves the label under which the VM will see the resource. A
// chosen one must be free; otherwise one is made from the resource's name.
func (b *Broker) takeLabel(d decided) (label string, release func(), err error) {
	instance := ""
	if u := b.unit(d.holder); u != nil {
		instance = u.instance()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	used := map[string]bool{}
	b.ledger.View(func(s *ledger.State) {
		for h := range s.Held(d.holder) {
			// What an earlier run mounted is gone from the VM, even where its
			// end is not yet on record.
			used[h.Label] = used[h.Label] || h.Persist || h.Instance == instance
		}
	})
	free := func(l string) bool { return !used[l] && !b.labels[labelKey{d.holder, l}] }
	take := func(l string) (string, func(), error) {
		key := labelKey{d.holder, l}
		b.labels[key] = true
		return l, func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			delete(b.labels, key)
		}, nil
	}
	if d.label != "" {
		if err := wire.CheckLabel(d.label); err != nil {
			return "", nil, api.Errorf(api.CodeInvalid, "cannot use %q as a label: %v", d.label, err)
		}
		if !free(d.label) {
			return "", nil, api.Errorf(api.CodeConflict, "VM %s already has a grant labelled %q", b.vmName(d.holder), d.label)
		}
		return take(d.label)
	}
	base := labelFrom(d.capability)
	for n := 1; ; n++ {
		l := base
		if n > 1 {
			l = fmt.Sprintf("%s-%d", base, n)
		}
		if free(l) {
			return take(l)
		}
	}
}

// labelFrom makes a label from the last part of a resource's name: in lower
// case, without accents, and without what no label can hold. Where that would
// lose most of the name, the label is the kind's.
func labelFrom(c capabilities.Capability) string {
	const most = 48 // leaves room for a number
	name := c.Resource.String()
	if partition, ok := c.Resource.Partition(); ok {
		name = strings.TrimPrefix(name, partition.String()+":")
	}
	if name = path.Base(name); name == "/" {
		return wholePartition
	}
	var label strings.Builder
	kept, lost := 0, 0
	for _, r := range norm.NFKD.String(strings.ToLower(name)) {
		switch {
		case r >= 'a' && r <= 'z' || r >= '0' && r <= '9':
			kept++
			label.WriteRune(r)
		case r == '.' || r == '_':
			label.WriteRune(r)
		case unicode.Is(unicode.Mn, r): // an accent
		case r < utf8.RuneSelf || unicode.IsSpace(r) || unicode.IsPunct(r):
			if !strings.HasSuffix(label.String(), "-") {
				label.WriteRune('-')
			}
		default:
			lost++
		}
	}
	if kept == 0 || lost > kept {
		return c.Kind
	}
	out := strings.TrimLeft(label.String(), "._-")
	return strings.TrimRight(out[:min(len(out), most)], "._-")
}

// wholePartition labels a grant on all of a partition: its directory's name.
const wholePartition = "files"

// await returns the grant once done says so, or ctx's error with its state by
// then.
func (b *Broker) await(ctx context.Context, id uuid.UUID, done func(ledger.Grant) bool) (ledger.Grant, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wake := b.ledger.Subscribe(ctx)
	var g ledger.Grant
	for {
		there := false
		b.ledger.View(func(s *ledger.State) {
			var now ledger.Grant
			if now, there = s.Grant(id); there {
				g = now
			}
		})
		if !there {
			// It is in an archive, and only what has ended for good goes there.
			g.ID, g.State = id, ledger.Revoked
			return g, nil
		}
		if done(g) {
			return g, nil
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return g, ctx.Err()
		}
	}
}

// outcome waits until a grant is true or has failed.
func (b *Broker) outcome(ctx context.Context, g ledger.Grant) (ledger.Grant, error) {
	began := time.Now()
	g, err := b.await(ctx, g.ID, func(g ledger.Grant) bool { return g.State != ledger.Pending })
	if err != nil {
		shown := b.apiGrant(context.WithoutCancel(ctx), g)
		e := api.Errorf(api.CodeTimeout, "grant %s is decided and recorded, and not applied yet%s; `spectrum-cap show %s` tells how it goes on", g.ID, becauseOf(shown.Trouble), g.ID)
		e.Grant = &shown
		return g, e
	}
	if g.State == ledger.Active {
		failpoint.Hit("request.active")
		b.metrics.applied(time.Since(began))
		return g, nil
	}
	e := applyError(b.reconciler.Failure(g.ID), g)
	shown := b.apiGrant(ctx, g)
	e.Grant = &shown
	return g, e
}
