package api

import (
	"log/slog"
	"net/http"
	"time"
)

// HostOptions are those of NewHostHandler. The zero value works.
type HostOptions struct {
	Log *slog.Logger
	// Metrics answers /v1/metrics in Prometheus text; nil: unavailable.
	Metrics http.Handler
	// MaxBody bounds a request's body; zero means 1 MiB.
	MaxBody int64
	// SlowReader is how long a reader of events or of an answer may leave
	// the connection full before it is cut off; zero means 10 s.
	SlowReader time.Duration
	// MaxFollowers bounds event streams that are open at once; zero means 64.
	MaxFollowers int
	// Streams counts event streams; nil: nobody wants to know.
	Streams *StreamStats
	// KeyTTL is how long the answer to an Idempotency-Key is remembered;
	// zero means 10 minutes.
	KeyTTL time.Duration
}

// HostHandler serves the host API.
type HostHandler struct {
	*door
	svc Service
	o   HostOptions
}

// NewHostHandler returns the host API over svc. Callers come from the context
// (ServeHost, WithCaller).
func NewHostHandler(svc Service, o HostOptions) *HostHandler {
	o.Log = logger(o.Log)
	setDefault(&o.MaxBody, 1<<20)
	setDefault(&o.SlowReader, defaultWriteWait)
	setDefault(&o.MaxFollowers, 64)
	setDefault(&o.KeyTTL, 10*time.Minute)
	if o.Streams == nil {
		o.Streams = &StreamStats{}
	}
	h := &HostHandler{svc: svc, o: o}
	h.door = &door{
		name:         "host",
		routes:       h.table(),
		log:          o.Log,
		caller:       func(r *http.Request) (Caller, bool) { return CallerFrom(r.Context()) },
		problem:      func(err error, _ *route) Problem { return problemOf(err) },
		keys:         newIdempotency(1024, 16<<20, o.KeyTTL),
		maxBody:      o.MaxBody,
		bodyTimeout:  defaultBodyWait,
		writeTimeout: o.SlowReader,
	}
	return h
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}
