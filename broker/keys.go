package broker

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/keys"
	"spectrum-os.org/broker/broker/ledger"
)

// ListKeys implements api.Service.
func (b *Broker) ListKeys(context.Context) ([]api.Key, error) { return b.keyViews(), nil }

// keyViews are all keys, the oldest first.
func (b *Broker) keyViews() []api.Key {
	b.mu.Lock()
	barred := maps.Clone(b.barredKeys)
	b.mu.Unlock()
	var out []api.Key
	b.ledger.View(func(s *ledger.State) {
		signed := s.SignedCounts()
		for _, k := range s.Keys() {
			v := keyView(k)
			v.Grants = signed[k.KID]
			if t, is := barred[k.KID]; is && v.Revoked == nil {
				v.State, v.Reason = api.KeyRevoked, t.Reason+" (not on record yet)"
			}
			out = append(out, v)
		}
	})
	return out
}

func keyView(k ledger.Key) api.Key {
	v := api.Key{KID: k.KID, State: api.KeyRetired, Created: k.Created, Epoch: k.Epoch}
	switch {
	case !k.Revoked.IsZero():
		v.State, v.Revoked, v.Reason = api.KeyRevoked, &k.Revoked, k.Reason
	case k.Current:
		v.State = api.KeyCurrent
	}
	if !k.Retired.IsZero() {
		v.Retired = &k.Retired
	}
	return v
}

// showKey is one key, and the current one.
func (b *Broker) showKey(kid string) (out, current api.Key) {
	for _, k := range b.keyViews() {
		if k.KID == kid {
			out = k
		}
		current = k // the newest
	}
	return out, current
}

// RotateKeys implements api.Service.
func (b *Broker) RotateKeys(ctx context.Context, by api.Caller) (api.Key, error) {
	staged, err := b.keys.Stage()
	if err != nil {
		return api.Key{}, api.Errorf(api.CodeUnavailable, "no new key could be made, and the present one stays: see the state directory's disk").WithCause(err)
	}
	_, err = b.ledger.Update(context.WithoutCancel(ctx), func(tx *ledger.Tx) error { return staged.Append(tx, actorOf(by)) })
	done := staged.Done(err)
	if err != nil {
		return api.Key{}, unrecorded("no new key is in use", err)
	}
	if done != nil {
		b.log.Error("the key file does not hold the new key yet", "kid", staged.KID(), "err", done)
	}
	made, _ := b.showKey(staged.KID())
	return made, nil
}

var kidPattern = regexp.MustCompile(`^[0-9a-f]{4,16}$`)

// resolveKey finds the key that a kid, or the first digits of one, stands for.
func (b *Broker) resolveKey(ref string) (ledger.Key, error) {
	if !kidPattern.MatchString(ref) {
		return ledger.Key{}, api.Errorf(api.CodeInvalid, "%q is no key: a key is named by 16 hexadecimal digits, or the first 4 or more of them", ref)
	}
	var fit []ledger.Key
	b.ledger.View(func(s *ledger.State) {
		fit = slices.DeleteFunc(s.Keys(), func(k ledger.Key) bool { return !strings.HasPrefix(k.KID, ref) })
	})
	switch len(fit) {
	case 0:
		return ledger.Key{}, api.Errorf(api.CodeNotFound, "there is no key %s; `spectrum-cap keys list` shows them", ref)
	case 1:
		return fit[0], nil
	}
	e := api.Errorf(api.CodeAmbiguous, "%s fits several keys", ref)
	for _, k := range fit {
		e.Candidates = append(e.Candidates, k.KID)
	}
	return ledger.Key{}, e
}

// RevokeKey implements api.Service. Everything that the key signed is refused
// from the moment that this is on record, and every grant for which it signed
// ends with it. The current key is replaced in the same step.
func (b *Broker) RevokeKey(ctx context.Context, by api.Caller, ref string, req api.RevokeKeyRequest) (api.RevokeKeyResult, error) {
	k, err := b.resolveKey(ref)
	if err != nil {
		return api.RevokeKeyResult{}, err
	}
	if !k.Revoked.IsZero() {
		return api.RevokeKeyResult{}, api.Errorf(api.CodeConflict, "key %s was revoked already, at %s", k.KID, k.Revoked.Format("2006-01-02 15:04:05 MST"))
	}
	reason := req.Reason
	if reason == "" {
		reason = "revoked by a person"
	}
	wait, cancel := b.bounded(ctx, req.TimeoutSeconds, defaultRevokeWait)
	defer cancel()
	done, err := b.revokeKey(wait, actorOf(by), k.KID, reason, req.Wait)
	if err != nil {
		return api.RevokeKeyResult{}, err
	}
	out := api.RevokeKeyResult{Revoked: b.apiGrants(ctx, done.revoked), Revoking: b.apiGrants(ctx, done.revoking)}
	out.Key, out.Current = b.showKey(k.KID)
	return out, nil
}

// revokeKey bars the key first: whoever has it could sign anything, and whether
// the ledger can be told is not known yet.
func (b *Broker) revokeKey(ctx context.Context, actor ledger.Actor, kid, reason string, wait bool) (revocation, error) {
	b.keys.Bar(kid)
	staged, err := b.stageFor(kid)
	if err != nil {
		b.barKey(kid, keyTombstone{actor, reason})
		return revocation{}, b.cutUnrecorded(actor, signedBy(kid), whyRevoked(kid, reason), err)
	}
	return b.revoke(ctx, actor, signedBy(kid), whyRevoked(kid, reason), wait, together{
		first: func(tx *ledger.Tx) error { return appendKeyRevocation(tx, staged, actor, kid, reason) },
		recorded: func(err error) {
			b.unstage(staged, err)
			if err != nil {
				b.barKey(kid, keyTombstone{actor, reason})
				return
			}
			b.keys.Unbar(kid)
		},
	})
}

func signedBy(kid string) func(*ledger.State) []uuid.UUID {
	return func(s *ledger.State) []uuid.UUID { return s.SignedBy(kid) }
}

func whyRevoked(kid, reason string) string {
	return fmt.Sprintf("signing key %s was revoked: %s", kid, reason)
}

// stageFor makes the key that is to take the current one's place; nil for any
// other, which never becomes current again.
func (b *Broker) stageFor(kid string) (*keys.Staged, error) {
	var current ledger.Key
	b.ledger.View(func(s *ledger.State) { current, _ = s.CurrentKey() })
	if current.KID != kid {
		return nil, nil //nolint:nilnil // none is needed
	}
	return b.keys.Stage()
}

func (b *Broker) unstage(staged *keys.Staged, err error) {
	if staged == nil {
		return
	}
	if err := staged.Done(err); err != nil {
		b.log.Error("the key file and the ledger do not agree yet", "kid", staged.KID(), "err", err)
	}
}

// appendKeyRevocation revokes a key, with the one that takes its place if it
// needs one. Two who revoke the same key agree.
func appendKeyRevocation(tx *ledger.Tx, staged *keys.Staged, actor ledger.Actor, kid, reason string) error {
	if staged != nil {
		if err := staged.Append(tx, actor); err != nil {
			return err
		}
	}
	if k, ok := tx.State().Key(kid); !ok || !k.Revoked.IsZero() {
		return nil
	}
	return tx.Append(ledger.Event{
		Type: ledger.KeyRevoked, Actor: actor, Data: ledger.JSON(ledger.KeyRevokedData{KID: kid, Reason: reason}),
	})
}
