package kill

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/google/uuid"

	"spectrum-os.org/broker/agents/guestcli"
	"spectrum-os.org/broker/broker/api"
)

// key is what was said of one signing key.
type key struct {
	kid        string
	mayRevoked bool // somebody asked for that
	revoked    bool // that was acknowledged
}

// rotateKeys makes a new key. What the ones before signed stays good.
func (l *life) rotateKeys(ctx context.Context, _ *rand.Rand) bool {
	if !l.keysBusy.TryLock() {
		return false
	}
	defer l.keysBusy.Unlock()
	l.locked(func() {
		l.keyMoves++
		l.current = ""
	})
	k, err := l.Client.RotateKeys(ctx)
	l.answered("rotateKeys", err)
	l.locked(func() {
		l.keyMoves++
		if err == nil {
			l.current = k.KID
			l.keys = append(l.keys, &key{kid: k.KID})
		}
	})
	l.note("rotate keys -> %s %v", k.KID, err)
	return true
}

// revokeKey revokes a retired key, and with it every grant for which it signed. It
// is seldom done: little would be left to lose.
func (l *life) revokeKey(ctx context.Context, r *rand.Rand) bool {
	if r.IntN(3) > 0 || !l.keysBusy.TryLock() {
		return false
	}
	defer l.keysBusy.Unlock()
	var retired []*key
	l.locked(func() {
		for _, k := range l.keys {
			if l.current != "" && k.kid != l.current && !k.mayRevoked {
				retired = append(retired, k)
			}
		}
	})
	if len(retired) == 0 {
		return false
	}
	k := retired[r.IntN(len(retired))]
	var signed, maybe []*grant
	l.locked(func() {
		k.mayRevoked = true
		for _, g := range l.grants {
			switch {
			case g.ended:
			case g.given && g.key == k.kid:
				signed = append(signed, g)
			case !g.given || g.key == "":
				maybe = append(maybe, g)
			}
		}
	})
	l.ending(append(maybe, signed...)...)
	out, err := l.Client.RevokeKey(ctx, k.kid, api.RevokeKeyRequest{Wait: r.IntN(4) > 0})
	l.note("revoke key %s of %d grants, or %d -> %d revoked %d revoking %v", k.kid, len(signed), len(signed)+len(maybe), len(out.Revoked), len(out.Revoking), err)
	l.answered("revokeKey", err)
	var unrecorded *api.Error
	cut := errors.As(err, &unrecorded) && unrecorded.Code == api.CodeUnavailable && strings.HasPrefix(unrecorded.Detail, "access was cut, but")
	if err != nil && !cut {
		return true
	}
	if cut {
		l.unrecorded.Add(1)
		for _, g := range signed {
			l.mustBeGone(ctx, g.vm.id, g.id)
		}
	}
	l.locked(func() { k.revoked = true })
	l.endedWith(k, slices.Concat(out.Revoked, out.Revoking))
	l.gone(signed...)
	for _, g := range out.Revoked {
		l.mustBeGone(ctx, g.Holder, g.ID)
	}
	return true
}

// endedWith takes in what a key's revocation is said to have ended: nothing that
// another key signs for.
func (l *life) endedWith(k *key, all []api.Grant) {
	ids := map[uuid.UUID]bool{}
	for _, g := range all {
		ids[g.ID] = true
	}
	ended := l.pick(func(g *grant) bool { return g.given && ids[g.id] })
	for _, g := range ended {
		var other bool
		l.locked(func() {
			other = true
			for at := g; at != nil; at = at.parent {
				other = other && at.key != "" && at.key != k.kid
			}
		})
		if other {
			l.failf("grant %s ended with key %s, and key %s signs for it", g.label, k.kid, g.key)
		}
	}
	l.gone(ended...)
}

// rotateAudit puts what is on record into an archive, where there is room for it.
func (l *life) rotateAudit(ctx context.Context, _ *rand.Rand) bool {
	if l.disk != "" {
		return false
	}
	out, err := l.Client.RotateAudit(ctx)
	l.answered("rotateAudit", err)
	l.note("rotate the audit -> %s %v", out.Archive.Name, err)
	return true
}

// renew gives a lease a later end.
func (l *life) renew(ctx context.Context, r *rand.Rand) bool {
	all := l.pick(func(g *grant) bool { return g.given && !g.ended && g.lease })
	if len(all) == 0 {
		return false
	}
	g := all[r.IntN(len(all))]
	seconds := int64(1 + r.IntN(3))
	l.locked(func() { g.later = true })
	out, err := l.Client.Renew(ctx, g.id.String(), api.RenewRequest{TTLSeconds: &seconds, AcceptNarrower: true, Wait: r.IntN(2) == 0})
	l.answered("renew", err)
	l.locked(func() {
		if err == nil && out.Expires != nil && out.Expires.After(g.expires) {
			g.expires = *out.Expires
		}
	})
	l.note("renew %s by %ds -> %v %s %v", g.label, seconds, out.Expires, out.State, err)
	return true
}

// delegateFrom is a guest that passes its own grant on.
func (l *life) delegateFrom(ctx context.Context, r *rand.Rand) bool {
	all := l.pick(l.delegable)
	if len(all) == 0 {
		return false
	}
	p, lifetime := all[r.IntN(len(all))], ttl(r)
	to := l.neighbour(p.vm)
	if l.held(to) >= most {
		return false
	}
	dead := false
	l.locked(func() { dead = p.ended })
	g := l.ask(to, false, lifetime != nil, p)
	out, err := l.guest(p.vm).Delegate(ctx, guestcli.Delegation{Grant: p.id.String(), To: to.id.String(), TTLSeconds: lifetime, Label: g.label})
	id, _ := uuid.Parse(out.ID)
	l.granted("delegateFrom", g, id, out.Expires, err)
	l.note("delegate %s from %s by %s to %s ttl=%v -> %s %s %v", g.label, p.label, p.vm.name, to.name, lifetime != nil, out.ID, out.State, err)
	if dead && err == nil {
		l.failf("grant %s was made from %s, whose end was acknowledged before", g.label, p.label)
	}
	return true
}

// neighbour is another VM of a VM's partition, or nil.
func (w *world) neighbour(vm *machine) *machine {
	for _, m := range w.machines {
		if m != vm && m.part == vm.part {
			return m
		}
	}
	return nil
}

// delegable tells whether a grant can be passed on: its VM has a neighbour, and
// both run. It is called under the model's mutex.
func (w *world) delegable(g *grant) bool {
	to := w.neighbour(g.vm)
	return g.given && !g.ended && g.vm.on && to != nil && to.on
}

// inArchives are the acknowledged grants that the broker does not list any more,
// and says to be in an archive.
func (w *world) inArchives(ctx context.Context, listed []api.Grant) (map[string]bool, error) {
	out, have := map[string]bool{}, map[string]bool{}
	for _, g := range listed {
		have[g.Label] = true
	}
	for _, g := range w.pick(func(g *grant) bool { return g.given && !have[g.label] }) {
		_, err := w.Client.ShowGrant(ctx, g.id.String())
		var said *api.Error
		switch {
		case !errors.As(err, &said) || said.Code != api.CodeNotFound:
			return out, fmt.Errorf("grant %s (%s) is in no list, and asked for it the broker says: %w", g.label, g.id, err)
		case strings.Contains(said.Detail, "is in an archive"):
			out[g.label] = true
		}
	}
	return out, nil
}

// wrongKeys are those whose state is none that was acknowledged. The newest signs.
func (w *world) wrongKeys(s sight) (wrong []string) {
	known := map[string]*key{}
	for _, k := range w.keys {
		known[k.kid] = k
		if !slices.ContainsFunc(s.keys, func(is api.Key) bool { return is.KID == k.kid }) {
			wrong = append(wrong, fmt.Sprintf("key %s was acknowledged, and is lost", k.kid))
		}
	}
	for i, is := range s.keys {
		k, newest := known[is.KID], i == len(s.keys)-1
		switch revoked := is.State == api.KeyRevoked; {
		case newest != (is.State == api.KeyCurrent):
			wrong = append(wrong, fmt.Sprintf("key %d of %d, %s, is %s", i+1, len(s.keys), is.KID, is.State))
		case k != nil && k.revoked && !revoked:
			wrong = append(wrong, fmt.Sprintf("the revocation of key %s was acknowledged, and it is %s", is.KID, is.State))
		case revoked && (k == nil || !k.mayRevoked):
			wrong = append(wrong, fmt.Sprintf("nobody revoked key %s (%s)", is.KID, is.Reason))
		case revoked && is.Grants > 0:
			wrong = append(wrong, fmt.Sprintf("key %s is revoked, and signs for %d grants", is.KID, is.Grants))
		}
	}
	return wrong
}

// settleKeys takes over what the broker says, under the model's mutex.
func (w *world) settleKeys(all []api.Key) {
	w.keys, w.current = nil, ""
	w.keyMoves++
	for _, is := range all {
		revoked := is.State == api.KeyRevoked
		w.keys = append(w.keys, &key{is.KID, revoked, revoked})
		if is.State == api.KeyCurrent {
			w.current = is.KID
		}
	}
}
