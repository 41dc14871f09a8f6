package api

import "log/slog"

// The types below carry a token. fmt and slog show what it is for, never the
// token itself; only JSON encoding does, which is how it is meant to leave.

// String hides the token.
func (t Token) String() string { return "token of grant " + t.Grant.String() }

// GoString hides the token.
func (t Token) GoString() string { return t.String() }

// LogValue hides the token.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// String hides the token.
func (g GuestGrant) String() string {
	return "grant " + g.ID.String() + " " + g.Spelling + " " + string(g.State)
}

// GoString hides the token.
func (g GuestGrant) GoString() string { return g.String() }

// LogValue hides the token.
func (g GuestGrant) LogValue() slog.Value { return slog.StringValue(g.String()) }

// String hides the token.
func (g GuestGranted) String() string { return g.Grant.String() }

// GoString hides the token.
func (g GuestGranted) GoString() string { return g.String() }

// LogValue hides the token.
func (g GuestGranted) LogValue() slog.Value { return slog.StringValue(g.String()) }

// String hides the token.
func (r GuestRequest) String() string { return "request for " + r.Capability }

// GoString hides the token.
func (r GuestRequest) GoString() string { return r.String() }

// LogValue hides the token.
func (r GuestRequest) LogValue() slog.Value { return slog.StringValue(r.String()) }

// String hides the token.
func (DropRequest) String() string { return "drop of a token" }

// GoString hides the token.
func (d DropRequest) GoString() string { return d.String() }

// LogValue hides the token.
func (d DropRequest) LogValue() slog.Value { return slog.StringValue(d.String()) }
