package app

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"time"

	"spectrum-os.org/broker/agents/wire"
)

// Server answers the broker.
type Server struct {
	mounts *Mounts
	health wire.Health
	log    *slog.Logger
	slots  chan struct{}
}

// maxRequests bounds what is worked on at once.
const maxRequests = 256

// NewServer serves mounts and says health.
func NewServer(m *Mounts, health wire.Health, log *slog.Logger) *Server {
	return &Server{mounts: m, health: health, log: log, slots: make(chan struct{}, maxRequests)}
}

// HTTP is a server for listeners that only the host can reach.
func (s *Server) HTTP() *http.Server {
	return &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    wire.MaxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}

// Handler is the route table. Every row's access rule is the listener's: the
// host, and nobody else.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	for pattern, h := range map[string]func(http.ResponseWriter, *http.Request) error{
		"GET /v1/health":            s.getHealth,
		"GET /v1/mounts":            s.listMounts,
		"POST /v1/mounts":           s.mount,
		"DELETE /v1/mounts/{label}": s.unmount,
		"/":                         func(http.ResponseWriter, *http.Request) error { return errNoRoute },
	} {
		mux.HandleFunc(pattern, s.bounded(h))
	}
	return mux
}

var errNoRoute = errors.New("no such route")

func (s *Server) bounded(h func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case s.slots <- struct{}{}:
			defer func() { <-s.slots }()
		default:
			refuse(w, errBusy)
			return
		}
		if err := h(w, r); err != nil {
			refuse(w, err)
		}
	}
}

func (s *Server) getHealth(w http.ResponseWriter, _ *http.Request) error {
	return answer(w, http.StatusOK, s.health)
}

func (s *Server) listMounts(w http.ResponseWriter, _ *http.Request) error {
	return answer(w, http.StatusOK, wire.MountList{Mounts: s.mounts.List()})
}

func (s *Server) mount(w http.ResponseWriter, r *http.Request) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, wire.MaxBody))
	if err != nil {
		return badRequest{err}
	}
	request, err := parseMount(body)
	if err != nil {
		return badRequest{err}
	}
	path, err := s.mounts.Mount(r.Context(), request)
	if err != nil {
		return err
	}
	return answer(w, http.StatusOK, wire.MountReply{Path: path})
}

// parseMount reads the body of POST /v1/mounts.
func parseMount(body []byte) (wire.MountRequest, error) {
	var request wire.MountRequest
	if err := wire.DecodeStrict(body, &request); err != nil {
		return wire.MountRequest{}, err
	}
	return request, request.Check()
}

func (s *Server) unmount(w http.ResponseWriter, r *http.Request) error {
	label := r.PathValue("label")
	if err := wire.CheckLabel(label); err != nil {
		return badRequest{err}
	}
	if err := s.mounts.Unmount(label); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// badRequest is the caller's fault.
type badRequest struct{ error }

var errBusy = errors.New("too many requests at once")

// refuse maps every error of this package to an answer.
func refuse(w http.ResponseWriter, err error) {
	status, code := http.StatusInternalServerError, wire.CodeFailed
	switch {
	case errors.As(err, &badRequest{}):
		status, code = http.StatusBadRequest, wire.CodeBadRequest
	case errors.Is(err, ErrNotMounted), errors.Is(err, errNoRoute):
		status, code = http.StatusNotFound, wire.CodeNotFound
	case errors.Is(err, ErrConflict):
		status, code = http.StatusConflict, wire.CodeConflict
	case errors.Is(err, ErrNoDevice), errors.Is(err, ErrInterrupted):
		status, code = http.StatusGatewayTimeout, wire.CodeTimeout
	case errors.Is(err, ErrUnderWay), errors.Is(err, ErrTooMany), errors.Is(err, errBusy):
		status, code = http.StatusServiceUnavailable, wire.CodeBusy
	}
	_ = answer(w, status, wire.ErrorReply{Code: code, Message: err.Error()})
}

func answer(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// The connection is the only thing that can fail now, and nobody is left
	// to be told.
	_ = json.NewEncoder(w).Encode(v)
	return nil
}
