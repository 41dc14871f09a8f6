package api

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/google/uuid"
	"golang.org/x/time/rate"
)

// GuestOptions bound what one guest may cost. The zero value works.
type GuestOptions struct {
	Log *slog.Logger
	// MaxBody bounds a request's body; zero means 64 KiB.
	MaxBody int64
	// MaxHeader bounds a request's line and header; zero means 8 KiB. It is
	// at least 4096.
	MaxHeader int
	// MaxConns bounds connections at once; zero means 16.
	MaxConns int
	// Rate and Burst are the token bucket of requests, in requests per
	// second; zero means 20 and 40.
	Rate  float64
	Burst int
	// HeaderTimeout, BodyTimeout and WriteTimeout bound how long a guest may
	// take over each; zero means 5 s.
	HeaderTimeout, BodyTimeout, WriteTimeout time.Duration
	// IdleTimeout is how long a connection may wait for its next request;
	// zero means 1 minute.
	IdleTimeout time.Duration
	// CallTimeout bounds the broker's work on one request; zero means 1
	// minute.
	CallTimeout time.Duration
}

func (o *GuestOptions) defaults() {
	o.Log = logger(o.Log)
	setDefault(&o.MaxBody, 64<<10)
	setDefault(&o.MaxHeader, 8<<10)
	setDefault(&o.MaxConns, 16)
	setDefault(&o.Rate, 20)
	setDefault(&o.Burst, 40)
	setDefault(&o.HeaderTimeout, 5*time.Second)
	setDefault(&o.BodyTimeout, 5*time.Second)
	setDefault(&o.WriteTimeout, 5*time.Second)
	setDefault(&o.IdleTimeout, time.Minute)
	setDefault(&o.CallTimeout, time.Minute)
}

// GuestHandler serves the guest API to one VM.
type GuestHandler struct {
	*door
	svc GuestService
	vm  uuid.UUID
	o   GuestOptions
}

// NewGuestHandler returns the guest API for the VM whose socket it will be
// served on. There is one handler per VM, so that bounds are per VM.
func NewGuestHandler(svc GuestService, vm uuid.UUID, o GuestOptions) *GuestHandler {
	o.defaults()
	h := &GuestHandler{svc: svc, vm: vm, o: o}
	h.door = &door{
		name:   "guest",
		routes: h.table(),
		log:    o.Log.With("vm", vm),
		caller: func(*http.Request) (Caller, bool) { return Caller{Kind: CallerVM, VM: vm}, true },
		problem: func(err error, rt *route) Problem {
			if rt == nil {
				return guestProblemOf(err, CodeNotFound)
			}
			return guestProblemOf(err, rt.hide)
		},
		keys:         newIdempotency(64, 1<<20, 10*time.Minute),
		limiter:      rate.NewLimiter(rate.Limit(o.Rate), o.Burst),
		maxBody:      o.MaxBody,
		bodyTimeout:  o.BodyTimeout,
		writeTimeout: o.WriteTimeout,
		callTimeout:  o.CallTimeout,
	}
	return h
}

// ServeGuest serves h on l until ctx is done, then lets requests under way
// finish within the grace. It closes l. It returns nil after a stop by ctx.
func ServeGuest(ctx context.Context, l net.Listener, h *GuestHandler, o ServeOptions) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: h.o.HeaderTimeout,
		IdleTimeout:       h.o.IdleTimeout,
		MaxHeaderBytes:    max(h.o.MaxHeader-netHTTPHeaderSlop, 1),
	}
	return serve(ctx, newBoundedListener(ctx, l, h.o.MaxConns), srv, o)
}
