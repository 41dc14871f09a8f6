package api

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// ServeOptions are those of ServeHost and ServeGuest. The zero value works.
type ServeOptions struct {
	Log *slog.Logger
	// Grace is how long requests under way may take once ctx is done; zero
	// means 5 s. Event streams and consoles end at once.
	Grace time.Duration
}

const (
	defaultGrace      = 5 * time.Second
	headerTimeout     = 5 * time.Second
	hostIdleTimeout   = 2 * time.Minute
	hostHeaderBytes   = 16 << 10
	defaultBodyWait   = 10 * time.Second
	defaultWriteWait  = 10 * time.Second
	netHTTPHeaderSlop = 4096 // net/http reads this much beyond MaxHeaderBytes
)

// session is one run of a server, which its handlers find in their context.
type session struct {
	stopping context.Context // done when no more should begin
	ending   context.Context // done when what is under way must end
	running  sync.WaitGroup  // handlers, with the connections they took over
}

type sessionKey struct{}

func sessionFrom(ctx context.Context) *session {
	s, _ := ctx.Value(sessionKey{}).(*session)
	return s
}

// detach returns a context that outlives the request it came from but not
// the server.
func detach(ctx context.Context) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancel(context.WithoutCancel(ctx))
	if s := sessionFrom(ctx); s != nil {
		stop := context.AfterFunc(s.ending, cancel)
		return out, func() { stop(); cancel() }
	}
	return out, cancel
}

// untilStopping returns a context that ends with ctx or when the server
// begins to stop.
func untilStopping(ctx context.Context) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancel(ctx)
	if s := sessionFrom(ctx); s != nil {
		stop := context.AfterFunc(s.stopping, cancel)
		return out, func() { stop(); cancel() }
	}
	return out, cancel
}

// ServeHost serves h on l, whose connections must be UNIX ones, until ctx is
// done, then lets requests under way finish within the grace. It closes l. It
// returns nil after a stop by ctx.
func ServeHost(ctx context.Context, l net.Listener, h http.Handler, o ServeOptions) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       hostIdleTimeout,
		MaxHeaderBytes:    hostHeaderBytes,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			caller, err := PeerCred(c)
			if err != nil {
				logger(o.Log).WarnContext(ctx, "connection without peer credentials", "error", err)
				return ctx
			}
			return WithCaller(ctx, caller)
		},
	}
	return serve(ctx, l, srv, o)
}

func serve(ctx context.Context, l net.Listener, srv *http.Server, o ServeOptions) error {
	if o.Grace == 0 {
		o.Grace = defaultGrace
	}
	ending, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	s := &session{stopping: ctx, ending: ending}
	base := context.WithValue(ending, sessionKey{}, s)
	srv.BaseContext = func(net.Listener) context.Context { return base }
	srv.ErrorLog = slog.NewLogLogger(logger(o.Log).Handler(), slog.LevelDebug)
	handler := srv.Handler
	srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.running.Add(1)
		defer s.running.Done()
		handler.ServeHTTP(w, r)
	})
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	var err error
	select {
	case err = <-served:
		end()
	case <-ctx.Done():
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.Grace)
		if srv.Shutdown(grace) != nil {
			end()
			_ = srv.Close()
		}
		cancel()
		err = <-served
	}
	end()
	s.running.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func logger(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}
