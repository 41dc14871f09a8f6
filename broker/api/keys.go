package api

import (
	"context"
	"net/http"
	"time"
)

// KeyState is what a signing key's signature is worth.
type KeyState string

// The states of a key.
const (
	KeyCurrent KeyState = "current" // it signs
	KeyRetired KeyState = "retired" // what it signed stays good
	KeyRevoked KeyState = "revoked" // nothing that it signed is accepted
)

// Key is a signing key as the ledger knows it. Only its public half is there.
type Key struct {
	KID     string     `json:"kid"`
	State   KeyState   `json:"state"`
	Epoch   uint64     `json:"epoch"`
	Created time.Time  `json:"created"`
	Retired *time.Time `json:"retired,omitempty"`
	Revoked *time.Time `json:"revoked,omitempty"`
	Reason  string     `json:"reason,omitempty"` // of its revocation
	Grants  int        `json:"grants"`           // live ones that it signs for
}

// KeyList is the answer to GET /v1/keys, the oldest first.
type KeyList struct {
	Keys []Key `json:"keys"`
}

// RevokeKeyRequest says why a key is revoked, and whether to wait until access
// is cut.
type RevokeKeyRequest struct {
	Reason         string  `json:"reason,omitempty"`
	Wait           bool    `json:"wait,omitempty"`            // answer when cut; else once durable
	TimeoutSeconds float64 `json:"timeout_seconds,omitempty"` // zero: the broker's default
}

// RevokeKeyResult tells what ended with a key. With any grants in Revoking the
// HTTP status is 202.
type RevokeKeyResult struct {
	Key      Key     `json:"key"`
	Current  Key     `json:"current"` // the key that signs now
	Revoked  []Grant `json:"revoked"`
	Revoking []Grant `json:"revoking"`
}

func (r *RevokeKeyRequest) validate() error {
	return firstError(
		checkText("reason", r.Reason, maxReason),
		checkSeconds("timeout_seconds", r.TimeoutSeconds),
	)
}

func (h *HostHandler) listKeys(x *exchange) (reply, error) {
	keys, err := h.svc.ListKeys(x.r.Context())
	return okUnless(KeyList{Keys: present(keys)}, err)
}

func (h *HostHandler) rotateKeys(x *exchange) (reply, error) {
	return okUnless(h.svc.RotateKeys(x.r.Context(), x.caller))
}

func (h *HostHandler) revokeKey(x *exchange) (reply, error) {
	req, err := decodeOptional[RevokeKeyRequest](x.body)
	if err != nil {
		return reply{}, err
	}
	res, err := h.svc.RevokeKey(x.r.Context(), x.caller, x.params["kid"], req)
	if err != nil {
		return reply{}, err
	}
	res.Revoked, res.Revoking = present(res.Revoked), present(res.Revoking)
	status := http.StatusOK
	if len(res.Revoking) > 0 {
		status = http.StatusAccepted
	}
	return reply{status: status, body: res}, nil
}

// ListKeys lists the signing keys, the oldest first.
func (c *Client) ListKeys(ctx context.Context) ([]Key, error) {
	l, err := call[KeyList](ctx, c, http.MethodGet, "/v1/keys", nil, nil)
	return l.Keys, err
}

// RotateKeys makes a new signing key; what the one before signed stays good.
func (c *Client) RotateKeys(ctx context.Context) (Key, error) {
	return call[Key](ctx, c, http.MethodPost, "/v1/keys/rotate", nil, nil)
}

// RevokeKey ends everything that a key signed. With r.Wait, what is still in
// Revoking afterwards could not be cut in time.
func (c *Client) RevokeKey(ctx context.Context, kid string, r RevokeKeyRequest) (RevokeKeyResult, error) {
	return call[RevokeKeyResult](ctx, c, http.MethodPost, "/v1/keys/"+seg(kid)+"/revoke", nil, r)
}
