package sources

import "errors"

// Errors of opening something beneath a partition. Each says, in the words of
// the wrapping error, which component of the path it is about.
var (
	ErrNotFound     = errors.New("does not exist")
	ErrSymlink      = errors.New("is a symbolic link, which are not followed")
	ErrMountPoint   = errors.New("is a mount point, which are not crossed")
	ErrNotDirectory = errors.New("is not a directory")
	ErrFileType     = errors.New("is neither a directory nor a regular file")
	ErrEscapes      = errors.New("leads out of the partition")
	ErrDenied       = errors.New("is not accessible to the broker")
	ErrUnavailable  = errors.New("cannot be read, the partition may be gone")
	ErrChanging     = errors.New("kept changing while it was opened")
)

// Errors of reading something bounded.
var (
	ErrTooLarge = errors.New("is too large")
	ErrTooMany  = errors.New("holds too much")
	ErrContents = errors.New("has wrong contents")
)
